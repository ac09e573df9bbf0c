"""What a run will take, found out before anything loads: at full size on the meta device, and against what it took."""

import os
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, random_pipeline, run_in_process
from diffusers import AutoencoderKL, UNet2DConditionModel
from launching import fork_and_wait, quick
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import common.trial
import train_add
import train_lcm
from common.engines import BLOCKS
from common.memory import SHARDED, LiveBytes, Sharding, bytes_of, in_words
from common.preflight import launched_sharding
from common.trial import make_networks, memory_of

GIB = 2**30


def arguments(**more):
    """Those that decide what memory a step takes, of a LoRA unless said otherwise."""
    lora = {"lora_rank": 4, "lora_alpha": 32.0, "lora_targets": ["to_q", "to_k", "to_v", "to_out.0"]}
    plain = {"train_batch_size": 1, "gradient_accumulation_steps": 1, "gradient_checkpointing": False}
    rest = {"resolution": 512, "quantize_frozen": None, "use_8bit_adam": False, "offload_ema": False}
    return SimpleNamespace(**{**lora, **plain, **rest, **more})


def vae():
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
    )


@pytest.fixture
def sd15(monkeypatch):
    """The parts of SD1.5, without memory for their weights."""
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)

    def models(args):
        with torch.device("meta"):
            unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
            return {"unet": unet, "text_encoder": CLIPTextModel(text), "vae": vae()}

    monkeypatch.setattr(common.trial, "empty_models_of", models)


@pytest.fixture
def sdxl(monkeypatch):
    """The parts of SDXL, without memory for their weights."""
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    text_2 = CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280
    )

    def models(args):
        with torch.device("meta"):
            unet = UNet2DConditionModel(
                sample_size=128,
                cross_attention_dim=2048,
                block_out_channels=(320, 640, 1280),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=[1, 2, 10],
                attention_head_dim=[5, 10, 20],
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            )
            encoders = {"text_encoder": CLIPTextModel(text), "text_encoder_2": CLIPTextModelWithProjection(text_2)}
            return {"unet": unet, **encoders, "vae": vae()}

    monkeypatch.setattr(common.trial, "empty_models_of", models)


def test_a_step_holds_what_autograd_keeps_and_its_peak_is_in_the_backward():
    """Two layers of 8 x 8, whose relu keeps its output: counted by hand, in fp32."""
    with torch.device("meta"):
        network = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.ReLU(), torch.nn.Linear(8, 8))
        x = torch.zeros(16, 8)
        with LiveBytes(network.parameters()) as live:
            loss = network(x).sum()
            assert live.now == 4 * (16 * 8 + 1)  # what the relu said, and the sum; not x, nor weights
            torch.autograd.backward(loss)
        del loss
    assert live.now == bytes_of(network) and live.gradients < live.now < live.peak


def test_sd15_flash_lora_fits_8_gb(sd15):
    networks = make_networks(arguments(), torch.bfloat16)
    found = memory_of(arguments(), networks, "cuda", torch.bfloat16)
    assert sum(p.numel() for p in networks.trained.parameters() if p.requires_grad) == 797_184
    assert 2e9 < found.rows["frozen weights"] < 2.2e9
    assert found.rows["optimizer states"] == 2 * found.rows["trained weights"] == 2 * 4 * 797_184
    assert 2.5e9 < found.total < 8e9


def test_gradient_checkpointing_and_a_smaller_batch_take_less(sd15):
    def total(**more):
        args = arguments(**more)
        return memory_of(args, make_networks(args, torch.float32), "cpu", torch.float32).rows["activations"]

    one, two = total(resolution=256), total(resolution=256, train_batch_size=2)
    assert one < two < 2.05 * one
    assert total(resolution=256, gradient_checkpointing=True) < one / 2


def test_what_a_full_sdxl_needs(sdxl):
    """Student, average and target in fp32, two moments of Adam and the frozen teacher in half precision: 52.6 GiB."""
    args = arguments(lora_rank=None, resolution=1024, gradient_checkpointing=True, gradient_accumulation_steps=2)
    networks = make_networks(args, torch.bfloat16, target=True)
    rows = memory_of(args, networks, "cuda", torch.bfloat16).rows
    teacher = bytes_of(networks.teacher)
    held = sum(rows[name] for name in ("trained weights", "their average", "target network", "optimizer states"))
    assert abs((held + teacher) / GIB - 52.6) < 0.05
    assert rows["gradients"] == rows["trained weights"] == 2 * teacher  # and 71.8 GiB where DDP copies them
    assert abs((held + teacher + 2 * rows["gradients"]) / GIB - 71.8) < 0.1


# Shared among processes


def full(processes, *sharding, device="cuda", dtype=torch.bfloat16, **more):
    """The Estimate of a whole UNet with its target network, of one of so many processes, and the bytes trained."""
    args = arguments(lora_rank=None, resolution=64, **more)
    networks = make_networks(args, dtype, target=True)
    trained = bytes_of(networks.trained)
    found = memory_of(args, networks, device, dtype, processes, sharding=Sharding(*sharding))
    assert bytes_of(networks.trained) == trained  # as it was found
    return found, trained


def test_gradients_that_are_sent_are_not_held():
    """The same two layers: each gradient of 8 x 8 lives for a moment."""
    with torch.device("meta"):
        network = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.ReLU(), torch.nn.Linear(8, 8))
        peaks = {}
        for sends in (False, True):
            with LiveBytes(network.parameters(), sends) as live:
                torch.autograd.backward(network(torch.zeros(16, 8)).sum())
            peaks[sends] = live.peak - live.gradients
            assert [p.grad is None for p in network.parameters()] == 3 * [sends] and live.gradients * sends == 0
    assert peaks[True] >= peaks[False]


def test_a_block_those_around_it_and_one_more_are_whole_at_once():
    def linear(*shape):
        return torch.nn.Linear(*shape, bias=False)

    blocks = torch.nn.ModuleList(torch.nn.Sequential(linear(10, 10), torch.nn.Bilinear(2, 5, 2)) for _ in range(2))
    network = torch.nn.Sequential(blocks, linear(5, 1))
    assert Sharding("fsdp2").gathered(network) == (249, 249, 249)  # the root alone: nothing is fetched meanwhile
    # Each block has 122, the root 5: a block, the root and the next block.
    assert Sharding("fsdp2", blocks=("Sequential",)).gathered(network) == (5, 122, 249)
    # Blocks within blocks: 100 of 22 each, and 5; one of 100 is fetched while another one runs.
    assert Sharding("fsdp2", blocks=("Sequential", "Linear")).gathered(network)[1:] == (100, 0 + 22 + 100 + 100)
    network.requires_grad_(False)
    assert Sharding("fsdp2").gathered(network) == (0, 0, 0)


def test_ddp_holds_all_and_its_buckets_from_the_start(sd15):
    alone, trained = full(1)
    among, _ = full(8)
    for name in ("frozen weights", "trained weights", "their average", "target network", "optimizer states"):
        assert alone.rows[name] == among.rows[name] > 0
    assert among.rows["gradients"] == trained >= alone.rows["gradients"]
    assert among.rows["activations"] >= alone.rows["activations"] and among.total == full(2)[0].total > alone.total
    accumulated, _ = full(1, gradient_accumulation_steps=2)
    assert among.total == accumulated.total  # gradients of before stand as buckets do
    both, _ = full(8, gradient_accumulation_steps=2)
    assert both.rows["gradients"] == 2 * trained and both.total == among.total + trained


@pytest.mark.parametrize("engine", ["fsdp2", "zero2"])
def test_an_engine_shares_what_it_shards_and_no_more(sd15, engine):
    ddp, trained = full(8)
    two, eight = (full(processes, engine, False, BLOCKS)[0].rows for processes in (2, 8))
    for name in SHARDED[engine]:
        whole = trained if name == "master weights" else ddp.rows[name]
        assert eight[name] == round(whole / 8) and two[name] == round(whole / 2) > 0
    for name in ("frozen weights", *(set(ddp.rows) - set(SHARDED[engine]) - {"activations"})):
        if not name.startswith(("gathered", "reduce")):
            assert eight[name] == two[name] == ddp.rows[name]
    assert eight["activations"] == two["activations"] <= ddp.rows["activations"]
    assert bool(eight["gathered weights"]) == bool(eight["gathered gradients"]) == (engine == "fsdp2")
    assert eight["reduce bucket"] == 4e8 * (engine == "zero2")


def test_fsdp2_gathers_in_the_compute_dtype_and_casts_nothing(sd15):
    rows = {dtype: full(8, "fsdp2", False, BLOCKS, dtype=dtype)[0].rows for dtype in (torch.float32, torch.bfloat16)}
    wide, half = rows.values()
    assert half["gathered weights"] == wide["gathered weights"] / 2
    assert half["trained weights"] == wide["trained weights"]
    assert half["activations"] < full(8)[0].rows["activations"] - 1.5e9  # without 860 M weights in bf16
    kept, trained = full(8, "fsdp2", False, BLOCKS, gradient_accumulation_steps=2)
    assert kept.rows == {**half, "gathered gradients": half["gathered gradients"] + trained}


@pytest.mark.parametrize("engine", ["fsdp2", "zero2"])
def test_what_an_engine_offloads_is_in_the_cpus_memory(sd15, engine):
    there, _ = full(8, engine, False, BLOCKS)
    away, trained = full(8, engine, True, BLOCKS)
    copy = (engine == "zero2") * trained / 8
    assert away.total + away.offloaded == there.total + copy and there.offloaded == 0
    assert away.offloaded == (6 if engine == "fsdp2" else 5) * trained / 8
    assert away.shown()[-1] == ("in the CPU's memory", in_words(away.offloaded))
    on_cpu, _ = full(8, engine, True, BLOCKS, device="cpu")
    assert on_cpu.offloaded == 0 and on_cpu.rows["optimizer states"] == there.rows["optimizer states"]


LAUNCHED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "8"}
LAUNCHED["FSDP_AUTO_WRAP_POLICY"] = "TRANSFORMER_BASED_WRAP"  # as accelerate_configs/fsdp2.yaml


def launched(monkeypatch, **more):
    for name, value in {**LAUNCHED, **more}.items():
        monkeypatch.setenv(name, value)


def test_what_accelerate_launch_asked_for(monkeypatch):
    assert launched_sharding() == Sharding()
    launched(monkeypatch)
    assert launched_sharding() == Sharding("fsdp2", False, BLOCKS)
    launched(monkeypatch, FSDP_OFFLOAD_PARAMS="true", FSDP_TRANSFORMER_CLS_TO_WRAP="A, B")
    assert launched_sharding() == Sharding("fsdp2", True, ("A", "B"))
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert launched_sharding() == Sharding("zero2", False)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    assert launched_sharding() == Sharding("zero2", True)


def test_a_dry_run_under_fsdp2_says_what_each_process_takes(pipelines, tmp_path, monkeypatch, capsys):
    launched(monkeypatch)
    arguments = quick(pipelines, tmp_path, "--dry_run")
    with pytest.raises(SystemExit):
        run_in_process(train_lcm, *arguments)
    said = capsys.readouterr().out
    assert re.search(r"\n  FSDP2 +shares among 8 processes: trained weights, their average, .*gradients\n", said), said
    assert "\n    gathered weights " in said and "reduce bucket" not in said and "MB on cpu, each process" in said


def test_a_discriminator_is_whole_beside_a_shared_student(pipelines, tmp_path, monkeypatch, capsys):
    """Of heads, their gradients and moments no process is rid of any part; and bf16 casts the student alone."""

    def rows(**told):
        with monkeypatch.context() as patched:
            patched.setenv("WORLD_SIZE", "1000000")
            for key, value in told.items():
                patched.setenv(key, value)
            with pytest.raises(SystemExit):
                run_in_process(train_add, *quick(pipelines, tmp_path, "--dry_run", "--mixed_precision", "bf16"))
        said = capsys.readouterr().out
        found = re.findall(r"\n    (trained weights|optimizer states|gradients) +([\d.]+ .?B)", said)
        heads = int(re.search(r"discriminator, ([\d,]+) parameters", said)[1].replace(",", ""))
        return dict(found), heads

    engine = {"FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    found, heads = rows(ACCELERATE_USE_FSDP="true", **engine)
    wanted = {"trained weights": 4 * heads, "optimizer states": 8 * heads, "gradients": 4 * heads}
    assert found == {name: in_words(count) for name, count in wanted.items()}
    alone, _ = rows()
    assert alone["trained weights"] != found["trained weights"]


# Measured


@pytest.fixture(scope="module")
def middling(tmp_path_factory):
    """The folder of a random pipeline whose UNet of 55 M parameters outweighs what a process holds beside it."""
    folder, pipeline = tmp_path_factory.mktemp("middling") / "pipeline", random_pipeline("sd")
    pipeline.unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(96, 192, 384),
        norm_num_groups=8,
        down_block_types=["CrossAttnDownBlock2D"] * 3,
        up_block_types=["CrossAttnUpBlock2D"] * 3,
        cross_attention_dim=32,
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="resident memory is read from /proc")
@pytest.mark.parametrize("name", ["train_flash_lora", "train_lcm", "train_student_kd"])
def test_the_estimate_is_within_15_percent_of_the_peak(middling, tmp_path, name):
    """A LoRA; a whole UNet with its average and a slow copy; a smaller UNet with features. Each in a fresh process."""
    flags = ["--pretrained_model_name_or_path", middling, "--dataset_name", "shapes", "--resolution", 64]
    flags += ["--train_batch_size", 4, "--max_train_steps", 2, "--report_to", "none", "--output_dir", tmp_path / "run"]
    flags += ["--num_ddim_steps", 1] * (name == "train_flash_lora")
    said = fork_and_wait(tmp_path, ROOT / f"{name}.py", *flags)
    peak, expected, percent = re.search(
        r"Peak memory (\S+ .B), estimated (\S+ .B) \((.\d+) %\), resident", said
    ).groups()
    assert expected in said[: said.index("steps:")]  # as the table had it
    print(f"{name}: {peak}, estimated {expected}, {percent} %")
    assert peak.endswith("B") and abs(int(percent)) <= 15, said[-2000:]
