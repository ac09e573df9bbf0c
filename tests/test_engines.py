"""FSDP2 and ZeRO-2: what they train is what DDP trains, and their checkpoints go on under any engine."""

import importlib
import shutil

import pytest
import torch
from conftest import ROOT, engine_environment, run_in_process
from launching import SCRIPTS, SPLIT, flags, fork_and_wait
from safetensors.torch import load_file

from common.parts import Parts

CONFIGS = {"fsdp2": "fsdp2", "zero2": "deepspeed_zero2", "offload": "deepspeed_zero2_offload"}
SHARDED = [name for name in SCRIPTS if name not in ("train_flash_lora", "train_add")]
LATEST = ["--resume_from_checkpoint", "latest"]

each_sharded = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in SHARDED]
)
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


def contents(checkpoint, names=("student", "student_ema")):
    """{(file, name): flat tensor} of what a checkpoint holds, whole or in parts."""
    found = {}
    for file in names:
        with Parts(checkpoint, file) as parts:
            found.update({(file, key): parts.read(key, 0, parts.numel(key)) for key in parts.keys() - {"step"}})
    return found


def assert_close(a, b, **tolerance):
    assert a.keys() == b.keys() and len(a) > 10
    for key in a:
        torch.testing.assert_close(a[key], b[key], **tolerance, msg=lambda m, key=key: f"{key}: {m}")


@each_sharded
@each_engine
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


GOES_ON = {"fsdp2": ("fsdp2", "zero2"), "zero2": ("zero2", "offload", "fsdp2")}


@each_engine
@pytest.mark.xdist_group("train_student_kd")
def test_a_sharded_checkpoint_goes_on_under_every_engine(pipelines, ddp, tmp_path, engine):
    """Of as many processes of its own engine bit for bit; of one process, or another engine, as near as a sum is."""
    name, line = "train_student_kd", ["--batch_size", 2, "--checkpointing_steps", 3]
    (first := tmp_path / "first").mkdir()
    run_under(engine, tmp_path, name, *whole(pipelines, name, first, *line))
    last = contents(first / "checkpoint-4", ("student", "student_ema", "optimizer"))
    ways = [(other, 2) for other in GOES_ON[engine]] + [(engine, 1), ("ddp", 1)]
    for other, processes in ways:
        folder = start_from(first / "checkpoint-3", tmp_path / f"{other}-{processes}")
        again = whole(pipelines, name, folder, *line, *LATEST)
        if other == "ddp":
            run_in_process(importlib.import_module(name), *again)
            assert_close(contents(folder / "checkpoint-4"), contents(first / "checkpoint-4"), **SPLIT)
            continue
        run_under(other, tmp_path, name, *again, processes=processes)
        same = (other, processes) == (engine, 2)
        tolerance = dict(atol=0, rtol=0) if same else SPLIT
        assert_close(contents(folder / "checkpoint-4", ("student", "student_ema", "optimizer")), last, **tolerance)
