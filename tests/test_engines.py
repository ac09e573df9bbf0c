"""FSDP2 and ZeRO-2: what they train is what DDP trains, and their checkpoints go on under any engine."""

import importlib
import shutil
import socket
import subprocess
import sys

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from conftest import ROOT, engine_environment, environment, fork, run_in_process
from launching import SCRIPTS, SPLIT, error_of, flags, fork_and_wait
from safetensors.torch import load_file

from benchmarks.processes import losses
from common.checkpoint import read_state
from common.parts import Parts

CONFIGS = {"fsdp2": "fsdp2", "zero2": "deepspeed_zero2", "offload": "deepspeed_zero2_offload"}
SHARDED = [name for name in SCRIPTS if name != "train_flash_lora"]
DOCUMENT = (ROOT / "docs/distributed.md").read_text()
LATEST = ["--resume_from_checkpoint", "latest"]

# All under FSDP2; under ZeRO-2 those that do more than train one model from beginning to end.
UNDER = [("fsdp2", name) for name in SHARDED]
UNDER += [("zero2", name) for name in ("train_lcm", "train_progressive", "train_add", "prune_and_quantize")]

each_engine = pytest.mark.parametrize("engine", ["fsdp2", "zero2"])


@pytest.fixture(scope="session")
def ddp(pipelines, uninterrupted, tmp_path_factory):
    """`ddp(name)`: the folder of four steps of a script that trains one whole model, in one process."""
    made = {}

    def get(name):
        if name not in made and name == "train_lcm":  # a LoRA elsewhere
            made[name] = tmp_path_factory.mktemp("lcm")
            run_in_process(importlib.import_module(name), *whole(pipelines, name, made[name]))
        return made[name] if name in made else uninterrupted(name)

    return get


def whole(pipelines, name, folder, *more):
    """Flags of a short run of a script that trains one whole model."""
    line = flags(pipelines, name, folder, *more)
    if "--lora_rank" in line:
        del line[line.index("--lora_rank") : line.index("--lora_rank") + 2]
    return line


def run_under(engine, tmp_path, name, *line, processes=2):
    told = engine_environment(CONFIGS[engine], "--mixed_precision", "no")
    return fork_and_wait(tmp_path, ROOT / f"{name}.py", *line, processes=processes, told=told)


def start_from(checkpoint, folder):
    """A folder in which a run can be resumed from a checkpoint of another one."""
    shutil.copytree(checkpoint, folder / checkpoint.name)
    if (checkpoint.parent / "student").is_dir():
        shutil.copytree(checkpoint.parent / "student", folder / "student")
    return folder


def contents(checkpoint, more=()):
    """{(file, name): flat tensor} of what a checkpoint holds, whole or in parts."""
    found, two = {}, ["discriminator"] * (checkpoint / "discriminator.safetensors").is_file()
    for file in ("student", "student_ema", *two, *more):
        with Parts(checkpoint, file) as parts:
            found.update({(file, key): parts.read(key, 0, parts.numel(key)) for key in parts.keys() - {"step"}})
    return found


def assert_close(a, b, **tolerance):
    assert a.keys() == b.keys() and len(a) > 10
    for key in a:
        torch.testing.assert_close(a[key], b[key], **tolerance, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize(
    "engine, name", [pytest.param(engine, name, marks=pytest.mark.xdist_group(name)) for engine, name in UNDER]
)
def test_a_sharded_run_is_that_of_one_process(pipelines, ddp, tmp_path, name, engine):
    """It goes on from DDP's checkpoint, optimizer and all, in two processes, and shows samples on the way."""
    start_from(ddp(name) / "checkpoint-2", tmp_path)
    shown = ["--validation_prompts", "a ring", "--validation_steps", 3, "--num_validation_images", 1]
    said = run_under(engine, tmp_path, name, *whole(pipelines, name, tmp_path, "--batch_size", 2, *LATEST, *shown))
    assert "it was 4 x 1 processes x 1 accumulated, and is 2 x 2 processes x 1 accumulated" in said
    cut = (tmp_path / "checkpoint-4/student-00001-of-00002.safetensors").is_file()
    assert cut == (engine == "fsdp2") and (tmp_path / "samples/step-3.png").is_file()
    assert (tmp_path / "checkpoint-4/optimizer-00001-of-00002.safetensors").is_file()
    assert_close(contents(tmp_path / "checkpoint-4"), contents(ddp(name) / "checkpoint-4"), **SPLIT)
    part = "text_encoder/model" if name == "train_text_encoder_kd" else "unet/diffusion_pytorch_model"
    finals = [load_file(folder / f"final/{part}.safetensors") for folder in (tmp_path, ddp(name))]
    assert_close(*finals, **SPLIT)


@pytest.mark.xdist_group("train_guided")
def test_two_machines_are_one_process(pipelines, ddp, tmp_path):
    """Two launchers with multi_node.yaml, of one process each, that find each other by an address."""
    start_from(ddp("train_guided") / "checkpoint-2", tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    line = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "no"]
    line += ["--config_file", ROOT / "accelerate_configs/multi_node.yaml", "--num_processes", 2, "--num_machines", 2]
    line += ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
    script = [ROOT / "train_guided.py", *whole(pipelines, "train_guided", tmp_path, "--batch_size", 2, *LATEST)]
    machines = []
    for rank in range(2):
        words = [str(word) for word in [*line, "--machine_rank", rank, *script]]
        output = (tmp_path / f"machine-{rank}.txt").open("w")
        told = {**environment(), "ACCELERATE_USE_CPU": "false"}
        machines.append(subprocess.Popen(words, cwd=ROOT, env=told, stdout=output, stderr=subprocess.STDOUT))
    codes = [machine.wait(timeout=300) for machine in machines]
    assert codes == [0, 0], (tmp_path / "machine-0.txt").read_text()[-3000:]
    assert_close(contents(tmp_path / "checkpoint-4"), contents(ddp("train_guided") / "checkpoint-4"), **SPLIT)
    assert "Done: " in (tmp_path / "machine-0.txt").read_text()


GOES_ON = {"fsdp2": [("fsdp2", 2), ("ddp", 1)], "zero2": [("zero2", 2), ("offload", 1), ("fsdp2", 1)]}


@each_engine
@pytest.mark.xdist_group("train_student_kd")
def test_a_sharded_checkpoint_goes_on_under_every_engine(pipelines, ddp, tmp_path, engine):
    """Of as many processes of its own engine bit for bit; of one process, or another engine, as near as a sum is."""
    name, line = "train_student_kd", ["--batch_size", 2, "--checkpointing_steps", 3]
    (first := tmp_path / "first").mkdir()
    run_under(engine, tmp_path, name, *whole(pipelines, name, first, *line))
    last = contents(first / "checkpoint-4", ["optimizer"])
    for other, processes in GOES_ON[engine]:
        folder = start_from(first / "checkpoint-3", tmp_path / f"{other}-{processes}")
        again = whole(pipelines, name, folder, *line, *LATEST)
        if other == "ddp":
            run_in_process(importlib.import_module(name), *again)
            assert_close(contents(folder / "checkpoint-4"), contents(first / "checkpoint-4"), **SPLIT)
            continue
        run_under(other, tmp_path, name, *again, processes=processes)
        same = (other, processes) == (engine, 2)
        tolerance = dict(atol=0, rtol=0) if same else SPLIT
        assert_close(contents(folder / "checkpoint-4", ["optimizer"]), last, **tolerance)


CHECKPOINTED = {  # what is computed again: by the script's flag, or by accelerate, which keeps the rest on the CPU
    "fsdp2": ([], {"FSDP_ACTIVATION_CHECKPOINTING": "true", "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "true"}),
    "fsdp2, by its flag": (["--gradient_checkpointing"], {}),
    "zero2": (["--gradient_checkpointing"], {}),
}


@pytest.mark.parametrize("way", CHECKPOINTED)
@pytest.mark.xdist_group("train_student_kd")
def test_half_precision_learned_projections_and_a_judge(pipelines, students, tmp_path, way):
    """bf16 is the computation's alone; a student of half the width learns projections, and best/ is judged by all."""
    student, (more, changed) = students("sd", "sd_small", (8, 16)), CHECKPOINTED[way]
    line = ["--student_model", student, "--batch_size", 2, "--mixed_precision", "bf16", "--eval_steps", 2, *more]
    line += ["--num_eval_images", 3, "--eval_inference_steps", 2, "--export", "fp16"]
    line = whole(pipelines, "train_student_kd", tmp_path, *line)
    told = {**engine_environment(CONFIGS[way.partition(",")[0]], "--mixed_precision", "no"), **changed}
    fork_and_wait(tmp_path, ROOT / "train_student_kd.py", *line, processes=2, told=told)
    before = load_file(student / "unet/diffusion_pytorch_model.safetensors")
    for name in ("best", "final"):
        after = load_file(tmp_path / name / "unet/diffusion_pytorch_model.safetensors")
        assert after.keys() == before.keys() and {tensor.dtype for tensor in after.values()} == {torch.float32}
        assert all(tensor.isfinite().all() and not torch.equal(tensor, before[key]) for key, tensor in after.items())
    assert (tmp_path / "final-fp16/model_index.json").is_file()
    projections = [key for file, key in contents(tmp_path / "checkpoint-4") if key.startswith("projections.")]
    assert len(projections) > 2


@pytest.mark.parametrize("config", ["cpu", "fsdp2"])
@pytest.mark.xdist_group("twenty")
def test_twenty_losses_of_two_processes_are_those_of_one(pipelines, twenty_losses, tmp_path, config):
    """Within 1e-5, at AdamW's usual epsilon."""
    told = engine_environment(config, "--mixed_precision", "no")
    line = long_run(pipelines, tmp_path, "--batch_size", 2)
    fork_and_wait(tmp_path, ROOT / "train_guided.py", *line, processes=2, told=told)
    for ours, theirs in zip(losses(tmp_path), twenty_losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def long_run(pipelines, folder, *more):
    usual = ["--report_to", "tensorboard", "--adam_epsilon", 1e-8, "--checkpointing_steps", 100]
    return whole(pipelines, "train_guided", folder, *usual, "--max_steps", 20, *more)


@pytest.fixture(scope="session")
def twenty_losses(pipelines, tmp_path_factory):
    folder = tmp_path_factory.mktemp("twenty")
    run_in_process(importlib.import_module("train_guided"), *long_run(pipelines, folder))
    found = losses(folder)
    assert len(found) == 20 and len(set(found)) == 20
    return found


@pytest.mark.xdist_group("train_student_kd")
def test_a_gradient_that_is_not_finite_costs_one_update(pipelines, students, tmp_path):
    """Under either engine, too: where one process has it all skip, and go on."""
    (tmp_path / "spoilt.py").write_text(SPOILT)
    for engine in ("fsdp2", "zero2"):
        folder = tmp_path / engine
        line = whole(pipelines, "train_student_kd", folder, "--batch_size", 2, "--checkpointing_steps", 1)
        told = engine_environment(CONFIGS[engine], "--mixed_precision", "no")
        script = ROOT / "train_student_kd.py"
        fork_and_wait(tmp_path, tmp_path / "spoilt.py", script, *line, processes=2, told=told)
        one, two, three = (contents(folder / f"checkpoint-{step}") for step in (1, 2, 3))
        assert all(torch.equal(one[key], two[key]) for key in one)
        assert all(three[key].isfinite().all() for key in three)
        assert not any(torch.equal(two[key], three[key]) for key in two if key[0] == "student_ema")
        states = [read_state(folder / f"checkpoint-{step}")["state"] for step in (1, 2, 3)]
        assert [state["skipped"]["student"] for state in states] == [[0, 0], [1, 1], [1, 0]]
        assert [state["averaged"]["student"] for state in states] == [1, 1, 2]


SPOILT = """
import os, runpy, sys
from accelerate import Accelerator
backward, calls = Accelerator.backward, []
def spoilt(self, loss):
    calls.append(loss)
    backward(self, loss * float("nan") if len(calls) == 2 and os.environ["RANK"] == "1" else loss)
Accelerator.backward = spoilt
sys.argv[:] = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_no_run_but_deepspeeds_imports_it(pipelines, tmp_path):
    """It takes seconds; accelerate would, to save a text encoder."""
    (tmp_path / "imported.py").write_text(IMPORTED)
    line = whole(pipelines, "train_guided", tmp_path / "run", "--max_steps", 1)
    assert "Done: " in fork_and_wait(tmp_path, tmp_path / "imported.py", ROOT / "train_guided.py", *line)
    assert (tmp_path / "run/final/text_encoder").is_dir()


IMPORTED = """
import os, runpy, sys
sys.argv[:] = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
assert "deepspeed" not in sys.modules
"""


# Refusals


def asked(monkeypatch, config, *more):
    for key, value in engine_environment(config, *more).items():
        monkeypatch.setenv(key, value)


REFUSED = [
    ("train_flash_lora", [], "a LoRA has a few megabytes"),
    ("train_guided", ["--lora_rank", 4], "a LoRA has a few megabytes"),
    ("train_add", ["--lora_rank", 4], "a LoRA has a few megabytes"),
    ("optimize_sds", [], "images or a volume are optimized"),
    ("train_guided", ["--torch_compile"], "--torch_compile is not for"),
]


@pytest.mark.parametrize("config, engine", [("fsdp2", "FSDP2"), ("deepspeed_zero2", "DeepSpeed")])
@pytest.mark.parametrize("name, more, reason", REFUSED)
def test_what_no_engine_shards_is_refused_at_once(monkeypatch, tmp_path, capsys, name, more, reason, config, engine):
    asked(monkeypatch, config, "--mixed_precision", "no")
    error = error_of(importlib.import_module(name), ["--output_dir", tmp_path / "run", *more], capsys)
    assert error.startswith(f"error: {engine}") or error.startswith("error: --torch_compile")
    assert reason in error and "accelerate_configs/multi_gpu.yaml" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


CONFIGURED = [
    ("fsdp2", {"FSDP_VERSION": "1"}, [], "fsdp_version: 2"),
    ("fsdp2", {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, [], "take TRANSFORMER_BASED_WRAP"),
    ("fsdp2", {"FSDP_OFFLOAD_PARAMS": "true"}, [], "use accelerate_configs/deepspeed_zero2_offload.yaml"),
    ("fsdp2", {}, ["--channels_last"], "--channels_last is not for FSDP2"),
    ("deepspeed_zero2", {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, [], "ZeRO's stage 2 alone"),
    ("deepspeed_zero2", {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, [], "no configuration file of its own"),
]


@pytest.mark.parametrize("config, changed, more, reason", CONFIGURED)
def test_another_configuration_is_refused_at_once(monkeypatch, tmp_path, capsys, config, changed, more, reason):
    asked(monkeypatch, config, "--mixed_precision", "no")
    for key, value in changed.items():
        monkeypatch.setenv(key, value)
    error = error_of(importlib.import_module("train_guided"), ["--output_dir", tmp_path / "run", *more], capsys)
    assert reason in error and error.count("\n") == 1


def test_magnitude_pruning_is_not_recovered_under_deepspeed(monkeypatch, tmp_path, capsys):
    asked(monkeypatch, "deepspeed_zero2", "--mixed_precision", "no")
    line = ["--method", "magnitude", "--output_dir", tmp_path / "run"]
    assert "--method magnitude masks gradients" in error_of(
        importlib.import_module("prune_and_quantize"), line, capsys
    )


def test_a_launcher_told_cpu_is_said_to_start_one_process(pipelines, tmp_path):
    """As it does whatever --num_processes says, and without the engine of its configuration."""
    told = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    process = fork(ROOT / "train_guided.py", "--dry_run", output=tmp_path / "said.txt", told=told, joined=False)
    assert process.wait() == 0 and "warning: accelerate launch --cpu starts one process" in said(tmp_path)


def said(folder):
    return (folder / "said.txt").read_text()


# Configurations


@pytest.mark.parametrize("file", sorted((ROOT / "accelerate_configs").iterdir()), ids=lambda file: file.stem)
def test_every_configuration_is_short_and_known_to_accelerate(file):
    lines = file.read_text().splitlines()
    assert 16 <= len(lines) <= 30 and lines[0].startswith("# ")
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(file), "x.py"]))
    assert args.mixed_precision in ("no", "fp16", "bf16") and f"accelerate_configs/{file.name}" in DOCUMENT
    unknown = [key for key in yaml.safe_load(file.read_text()).get("fsdp_config", {}) if not hasattr(args, key)]
    assert not unknown
