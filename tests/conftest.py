"""Fixtures: tiny random pipelines of every supported shape, and ways to run a script in this process or launched."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
torch.set_num_threads(1)  # tests run side by side, and one thread sums in one order
pytest.register_assert_rewrite("launching", "sharding")  # else those of tests and conftest.py alone are explained


LONG = ("simulated_cuda_0", "simulated_cuda_1", "test_student_kd_runs", "test_evaluate", "test_tiny_sd", "test_app")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="many rounds of what is tried at random moments")


@pytest.fixture(autouse=True)
def no_estimate(request, monkeypatch):
    """Runs within the tests' own process don't estimate their memory, which takes longer than they do."""
    import common.preflight

    if request.node.path.name != "test_memory.py" and "dry_run" not in request.node.name:
        monkeypatch.setattr(common.preflight, "describe", lambda *_: ([], None, None))


@pytest.fixture(scope="session")
def rounds(request):
    """How often a fault at a random moment is tried."""
    return 20 if request.config.getoption("--slow") else 3


@pytest.hookimpl(tryfirst=True)  # before xdist looks at the groups
def pytest_collection_modifyitems(items):
    for item in items:  # the tests of a file share what it makes, so they share a worker
        if not any(item.iter_markers("xdist_group")):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    # Begun last, one of these would be what everything waits for.
    items.sort(key=lambda item: next(item.iter_markers("xdist_group")).args[0] not in LONG)
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def random_pipeline(kind):
    """A pipeline with random weights and the structure of SD1.5 ("sd"), SD2.x with v-prediction ("v") or SDXL.

    "plain-sd" and "plain-sdxl": with a first block that has no attention, as SDXL's has none.
    """
    plain, kind = kind.startswith("plain-"), kind.removeprefix("plain-")
    from diffusers import (
        AutoencoderKL,
        PNDMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from prepare_tiny_sd import build_tokenizer

    torch.manual_seed(0)
    tokenizer = build_tokenizer()

    def text_config(width):
        return CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=2,
            projection_dim=32,
            num_attention_heads=2,
            max_position_embeddings=20,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=32,
        block_out_channels=(8, 16, 16),
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        scaling_factor=0.5,
    )
    xl = dict(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=[1, 2],
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D" if plain else "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D" if plain else "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=64 if kind == "sdxl" else 32,
        **(xl if kind == "sdxl" else {}),
    )
    prediction_type = "v_prediction" if kind == "v" else "epsilon"
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        skip_prk_steps=True,
        prediction_type=prediction_type,
    )
    if kind == "sdxl":
        return StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=CLIPTextModel(text_config(32)),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            text_encoder_2=CLIPTextModelWithProjection(text_config(32)),
            unet=unet,
            scheduler=scheduler,
            add_watermarker=False,
        )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config(32)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory):
    """`pipelines(kind)`: the folder of a random pipeline, made once per session."""
    made = {}

    def get(kind="sd"):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "pipeline"
            random_pipeline(kind).save_pretrained(made[kind])
        return str(made[kind])

    return get


@pytest.fixture(scope="session")
def students(pipelines, tmp_path_factory):
    """`students(kind, variant, widths)`: the folder of a student of the random pipeline, made once per session."""
    from common.compression import students
    from common.compression.manifest import write_manifest
    from common.pipelines import load_pipeline

    made = {}

    def get(kind="sd", variant=None, widths=None):
        if (kind, variant, widths) not in made:
            folder = tmp_path_factory.mktemp("student") / "pipeline"
            pipeline = load_pipeline(pipelines(kind))
            pipeline.unet, manifest = students.build_student(pipeline.unet, variant, widths)
            pipeline.save_pretrained(folder)
            write_manifest(folder, {"parent": pipelines(kind), **manifest})
            made[kind, variant, widths] = folder
        return made[kind, variant, widths]

    return get


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of 11 captioned pictures of several sizes, one of which is broken, and one with two captions."""
    import numpy as np
    from PIL import Image

    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    rows = []
    for number in range(11):
        size = (40 + 3 * number, 48, 3) if number % 2 else (36, 52 + number, 3)
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{number:02d}.png")
        captions = [f"picture {number}"] + ["another word for it"] * (number == 3)
        rows.append({"file_name": f"{number:02d}.png", "text": captions})
    (folder / "04.png").write_bytes(b"no picture")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def caches(pipelines, pictures, tmp_path_factory):
    """`caches(kind, *flags)`: the folder of a cache of the pictures by a random pipeline, made once per session."""
    from launching import preparing

    import prepare_cache

    made = {}

    def get(kind="sd", *more):
        if (kind, *more) not in made:
            folder = tmp_path_factory.mktemp("cache") / "cache"
            run_in_process(prepare_cache, *preparing(pipelines, pictures, folder, kind), *more)
            made[kind, *more] = folder
        return made[kind, *more]

    return get


@pytest.fixture(scope="session")
def dinov2(tmp_path_factory):
    """The folder of a small random DINOv2."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dinov2")
    config = Dinov2Config(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    return folder


def save_random_lora(pipeline, folder, parent, alpha):
    """A LoRA of rank 2 and random weights for 2 steps, as train_flash_lora.py writes it. It stays attached."""
    from peft import LoraConfig

    from common.contract import write_distillation
    from common.lora import save_lora
    from common.schedulers import student_scheduler, student_timesteps

    config = LoraConfig(r=2, lora_alpha=alpha, init_lora_weights=False, target_modules=["to_q", "to_v"])
    pipeline.unet.add_adapter(config)
    save_lora(folder, pipeline)
    scheduler = student_scheduler(pipeline.scheduler, "x0", 2)
    scheduler.save_pretrained(folder / "scheduler")
    write_distillation(
        folder,
        method="flash_lora",
        parent=parent,
        revision=None,
        variant=None,
        steps=2,
        timesteps=student_timesteps(scheduler, 2),
        guidance="baked",
        guidance_scale=1.0,
        target="x0",
    )


def save_random_vgg16(path):
    """A file for --lpips_trunk_path with random weights; returns the convolutions it holds."""
    import torchvision
    from safetensors.torch import save_file

    torch.manual_seed(0)
    trunk = torchvision.models.vgg16(weights=None).features
    save_file({f"features.{k}": v for k, v in trunk.state_dict().items()}, path)
    return trunk


class FakeInception(torch.nn.Module):
    """A stand-in for Inception, whose weights no test can make up: uint8 images (B, 3, H, W) to 4 numbers each."""

    num_features = 4

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(48, 4, generator=generator), requires_grad=False)

    def forward(self, images):
        assert images.dtype == torch.uint8
        pooled = torch.nn.functional.adaptive_avg_pool2d(images.to(self.weight.dtype) / 255, 4)
        return pooled.flatten(1) @ self.weight


@pytest.fixture
def compiled(monkeypatch):
    """The modules that torch.compile traces and differentiates from here on.

    Without Inductor, which takes minutes to generate its CPU code.
    """
    modules, compile = [], torch.nn.Module.compile

    def compile_quickly(module):
        modules.append(module)
        compile(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_quickly)
    return modules


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")  # the first lines of this file keep other tests on the CPU


@pytest.fixture(scope="session")
def uninterrupted(pipelines, tmp_path_factory):
    """`uninterrupted(name)`: the folder of a script's four steps in one go, with samples, in FP16 and INT8 too."""
    from launching import flags

    made = {}

    def get(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            shown = ["--validation_prompts", "a ring", "--validation_steps", 3, "--num_validation_images", 1]
            module = importlib.import_module(name)
            run_in_process(module, *flags(pipelines, name, made[name], *shown, "--export", "fp16", "int8"))
        return made[name]

    return get


@pytest.fixture
def apart(tmp_path, monkeypatch):
    """Indexes that can't lie beside their shards stay in the test, and nothing waits for a network."""
    from common import remote, shard_index

    monkeypatch.setattr(shard_index, "HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(remote, "WAITS", (0, 0, 0))
    shard_index._remote_shards.cache_clear()


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """sharding.UNEVEN's 165 samples in six shards, without an index."""
    from sharding import write_shards

    return write_shards(tmp_path_factory.mktemp("shards") / "made")


@pytest.fixture
def shards(made, tmp_path):
    """The same, to be changed."""
    return Path(shutil.copytree(made, tmp_path / "shards"))


def run_in_process(module, *arguments):
    """Run a script in this process, as its command line would."""
    run_main(module, module.parse_args([str(argument) for argument in arguments]))


def run_main(module, args):
    """A script's main with accelerate's process-wide state as new; the signals' handlers are put back afterwards."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        module.main(args)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def environment():
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    clean = {key: value for key, value in os.environ.items() if key not in names}
    return {**clean, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}


def launch_command(script, *arguments, processes=1):
    """The command line of a real launch: accelerate's launcher with gloo where there are several processes."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    if processes > 1:
        launcher += ["--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml"), "--main_process_port", "0"]
    else:
        launcher += ["--cpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*launcher, str(script), *(str(argument) for argument in arguments)]


def engine_environment(config, *more):
    """What `accelerate launch --config_file accelerate_configs/<config>.yaml` tells a script by its environment."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    line = ["--config_file", str(ROOT / "accelerate_configs" / f"{config}.yaml"), "--main_process_port", "0", *more]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args([*line, "script.py"]))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        told = prepare_deepspeed_cmd_env(args)[1]
    else:
        told = prepare_multi_gpu_env(args)
    kept = {key: value for key, value in told.items() if key.startswith(("ACCELERATE_", "FSDP_"))}
    return {**kept, "ACCELERATE_USE_CPU": "false"}


def fork(script, *arguments, processes=1, cwd=ROOT, output, told=None, joined=None):
    """Start a script without a launcher and with its libraries loaded; what it says goes to the file `output`.

    told: more of its environment, such as engine_environment's, of processes that a launcher has joined.
    """
    from forking import Forked

    Path(output).touch()
    joined = told is not None if joined is None else joined
    return Forked(script, arguments, {**environment(), **(told or {})}, cwd, output, processes, joined)


def launch(script, *arguments, processes=1, cwd=ROOT, check=True):
    """Launch a script and wait; returns the finished process with its output as text."""
    result = subprocess.run(
        launch_command(script, *arguments, processes=processes),
        cwd=cwd,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert not check or result.returncode == 0, result.stdout[-4000:]
    return result


def read_json(path):
    return json.loads(Path(path).read_text())
