"""The small parts that every script stands on: averages, taps, folders, signals, arguments, configurations."""

import json
import math
import os
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT, random_pipeline, save_random_vgg16

import common.stopping
from common import arguments
from common.checkpoint import (
    FinalFolder,
    check_same_run,
    checkpoints_in,
    find_checkpoint,
    make_folder,
    read_state,
    refuse_other_run,
    split_as_before,
)
from common.contract import TINY_SD, write_distillation
from common.ema import EMA, copy_tensors
from common.errors import CheckpointError, ModelError, UsageError
from common.hooks import FeatureTap
from common.identity import identity_of
from common.judging.metrics import load_lpips
from common.judging.previews import image_grid
from common.optimization import learning_rate_at
from common.pipelines import load_pipeline, read_pipeline_config
from common.settle import use_embedded_default
from common.stopping import StopSignal, Time, age


def parameters(seed=0):
    torch.manual_seed(seed)
    return {"a": torch.nn.Parameter(torch.randn(3)), "b": torch.nn.Parameter(torch.randn(2, 2).half())}


# EMA


def test_ema_is_the_recursion_with_its_warm_up():
    tracked = parameters()
    ema, expected = EMA(tracked, decay=0.9), tracked["a"].detach().clone()
    for n in range(1, 200):
        with torch.no_grad():
            tracked["a"].add_(1.0)
        ema.step(tracked)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * tracked["a"].detach()
    torch.testing.assert_close(ema.shadow["a"], expected, atol=1e-3, rtol=1e-5)
    assert ema.shadow["b"].dtype == torch.float32


def test_ema_applied_gives_the_own_weights_back_bit_for_bit():
    tracked = parameters()
    ema = EMA(tracked)
    with torch.no_grad():
        tracked["a"].mul_(3)
    own = tracked["a"].detach().clone()
    with pytest.raises(RuntimeError, match="inside"), ema.applied(tracked):
        assert torch.equal(tracked["a"], ema.shadow["a"])
        raise RuntimeError("inside")
    assert torch.equal(tracked["a"], own)


def test_ema_never_averages_in_part():
    ema = EMA(parameters())
    with pytest.raises(KeyError, match="differ in 1 names"):
        ema.step({"a": parameters()["a"]})
    with pytest.raises(KeyError):
        copy_tensors({"a": torch.zeros(3)}, parameters())


# Hooks


def test_feature_taps_read_blocks_and_leave():
    unet = random_pipeline("sd").unet
    names = ["down_blocks.0", "mid_block", "up_blocks.1"]
    z, t, text = torch.randn(2, 4, 8, 8), torch.tensor([10, 20]), torch.randn(2, 5, 32)
    with torch.no_grad(), FeatureTap(unet, names) as tap:
        unet(z, t, text)
        assert {name: tuple(f.shape) for name, f in tap.features.items()} == {
            "down_blocks.0": (2, 16, 4, 4),
            "mid_block": (2, 32, 4, 4),
            "up_blocks.1": (2, 16, 8, 8),
        }
        tap.features.clear()
    with torch.no_grad():
        unet(z, t, text)
    assert not tap.features
    with pytest.raises(KeyError, match="no_block"):
        FeatureTap(unet, ["no_block"])


# Folders and checkpoints


def make_checkpoint(folder, step, **state):
    (folder / f"checkpoint-{step}").mkdir(parents=True)
    content = {"step": step, "global_batch_size": 4, "arguments": {"seed": 0}, "state": {}, **state}
    (folder / f"checkpoint-{step}" / "state.json").write_text(json.dumps(content))


def test_only_complete_checkpoints_count_and_they_sort_by_number(tmp_path):
    for step in (5, 10, 100, 20):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-200").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    assert [step for step, _ in checkpoints_in(tmp_path)] == [5, 10, 20, 100]
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-100"
    assert find_checkpoint(tmp_path, "checkpoint-20").name == "checkpoint-20"
    assert find_checkpoint(tmp_path, None) is None and find_checkpoint(tmp_path / "empty", "latest") is None
    with pytest.raises(CheckpointError, match="checkpoint-200"):
        find_checkpoint(tmp_path, "checkpoint-200")


def test_a_run_is_continued_only_with_the_same_maths(tmp_path):
    make_checkpoint(tmp_path, 5)
    check_same_run(tmp_path / "checkpoint-5", {"seed": 0}, 4)
    with pytest.raises(CheckpointError, match="seed was 0, now 1"):
        check_same_run(tmp_path / "checkpoint-5", {"seed": 1}, 4)
    with pytest.raises(CheckpointError, match="global batch size was 4, now 8"):
        check_same_run(tmp_path / "checkpoint-5", {"seed": 0}, 8)


@pytest.mark.parametrize(
    "asked, found",
    [
        ((4, 2, 2), (4, 2, 2)),  # as before
        ((4, 1, 2), (4, 1, 4)),  # fewer processes accumulate more
        ((4, 4, 2), (4, 4, 1)),  # more processes, less
        ((4, 8, 2), (2, 8, 1)),  # and where that is not enough, smaller micro-batches
        ((8, 1, 2), (8, 1, 2)),  # as asked for, where that is the same global batch
        ((3, 1, 1), (2, 1, 8)),  # of the next smaller size that divides it
        ((1, 16, 1), (1, 16, 1)),
    ],
)
def test_another_number_of_processes_keeps_the_global_batch(tmp_path, capsys, asked, found):
    make_checkpoint(tmp_path, 5, global_batch_size=16, split=[4, 2, 2])
    assert tuple(split_as_before(tmp_path / "checkpoint-5", *asked)) == found
    said = capsys.readouterr().out
    assert ("The global batch stays 16" in said) == (found != (4, 2, 2)) and math.prod(found) == 16


def test_processes_that_can_not_share_the_global_batch_are_refused(tmp_path):
    make_checkpoint(tmp_path, 5, global_batch_size=16, split=[4, 2, 2])
    for processes in (3, 32):
        with pytest.raises(CheckpointError, match=f"global batch of 16, which {processes} processes can't share"):
            split_as_before(tmp_path / "checkpoint-5", 4, processes, 2)
    # By the same number it is what was asked for, which is another run's.
    assert split_as_before(tmp_path / "checkpoint-5", 8, 2, 2) == [8, 2, 2]
    make_checkpoint(tmp_path, 6, global_batch_size=16)  # of a version that did not say
    assert split_as_before(tmp_path / "checkpoint-6", 4, 2, 1) == [4, 2, 1]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"step": 5}', '{"step": "x", "arguments": {}, "state": {}}'])
def test_a_state_that_can_not_be_read_is_one_sentence(tmp_path, content):
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match="state.json can't be read") as error:
        read_state(tmp_path)
    assert "\n" not in str(error.value) and str(error.value).count("can't be read") == 1


def test_another_runs_folder_is_refused_or_discarded(tmp_path):
    make_checkpoint(tmp_path, 5)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="--overwrite_output_dir"):
        refuse_other_run(tmp_path, None, False)
    refuse_other_run(tmp_path, None, True)
    refuse_other_run(tmp_path, tmp_path / "checkpoint-5", False)
    make_folder(tmp_path, tmp_path / "checkpoint-5")
    assert (tmp_path / "checkpoint-5").is_dir()
    make_folder(tmp_path, None)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


FOREIGN = (
    "finals_thesis",
    "checkpoint-photos",
    "final_draft",
    "checkpoint-5-backup",
    "my-checkpoint-5",
    "stage-x",
    "final-fp32",
    "best",
    "student",
    ".cache.tmp",
    ".venv",
    "Final",
)
OWN = (
    "checkpoint-7",
    "stage-4",
    "final",
    "final-fp16",
    "final-int8",
    "final-fp8",
    ".checkpoint-9.tmp",
    ".final.tmp",
    ".checkpoint-5.old.tmp",
)


def test_only_what_a_run_wrote_is_removed(tmp_path):
    make_checkpoint(tmp_path, 5)
    for name in (*FOREIGN, *OWN):
        (tmp_path / name).mkdir()
        (tmp_path / name / "work.txt").write_text("mine")
    make_folder(tmp_path, tmp_path / "checkpoint-5")  # a resume: only what comes after it, and torn saves
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*FOREIGN, "checkpoint-5", "stage-4", "final", "final-fp16", "final-int8", "final-fp8"}
    refuse_other_run(tmp_path, None, True)
    make_folder(tmp_path, None)
    assert {path.name for path in tmp_path.iterdir()} == {*FOREIGN}
    assert all((tmp_path / name / "work.txt").read_text() == "mine" for name in FOREIGN)
    for name in ("best", "student"):  # those that train_student_kd.py wrote carry a contract
        (tmp_path / name / "distillation.json").write_text("{}")
    make_folder(tmp_path, None)
    assert {path.name for path in tmp_path.iterdir()} == {*FOREIGN} - {"best", "student"}


def test_a_final_folder_appears_whole_or_not_at_all(tmp_path):
    with FinalFolder(tmp_path / "final") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "final").exists()
    with pytest.raises(RuntimeError), FinalFolder(tmp_path / "final") as folder:
        (folder / "a").write_text("2")
        raise RuntimeError
    assert (tmp_path / "final" / "a").read_text() == "1"
    with FinalFolder(tmp_path / "final") as folder:
        (folder / "b").write_text("3")
    assert [path.name for path in tmp_path.rglob("*")] == ["final", "b"]


def test_time_is_short_before_it_is_over(monkeypatch):
    """By the longest step, and twice the longest checkpoint; before there was one, a tenth of the time."""
    now = [0.0]
    monkeypatch.setattr(common.stopping, "age", lambda: now[0])
    limit = Time(10)  # 600 seconds, of which 60 are left for a first checkpoint
    asked = {at: None for at in (100, 130, 150, 509, 511)}
    for now[0] in asked:
        asked[now[0]] = limit.is_short()
    assert asked == {100: False, 130: False, 150: False, 509: True, 511: True}  # its longest step is of 359
    limit = Time(10)
    for now[0] in (100, 110, 120):
        assert not limit.is_short()
    StopSignal.saved(SimpleNamespace(_time=limit), 20)
    StopSignal.saved(SimpleNamespace(_time=limit), 5)
    found = {}
    for now[0] in range(130, 601, 10):
        found[now[0]] = limit.is_short()
    assert [at for at, short in found.items() if short] == list(range(550, 601, 10))


def test_a_process_knows_its_age():
    import psutil

    assert age() == pytest.approx(time.time() - psutil.Process().create_time(), abs=1)


def test_signals_are_noted_and_the_second_interrupt_is_at_once():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        stop = StopSignal()
        assert not stop.requested()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# Arguments


@pytest.mark.parametrize("kind, ends", [("constant", 1.0), ("linear", 0.1), ("cosine", 0.0245)])
def test_learning_rate_is_a_function_of_the_step(kind, ends):
    parser = arguments.make_parser("")
    arguments.add_optimization_arguments(parser, learning_rate=1.0, train_batch_size=1, max_train_steps=12)
    args = parser.parse_args(["--lr_scheduler", kind, "--lr_warmup_steps", "2"])
    rates = [learning_rate_at(step, args) for step in range(12)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[-1] == pytest.approx(ends, rel=1e-2)


def test_the_embedded_default_and_a_model_without_data(tmp_path):
    parser = arguments.make_parser("")
    arguments.add_model_arguments(parser)
    arguments.add_data_arguments(parser)
    args = parser.parse_args([])
    use_embedded_default(args)
    # A checkout that was moved still resumes its runs.
    assert identity_of(args)["pretrained_model_name_or_path"]["path"] == "assets/tiny-sd"
    assert args.dataset_name == "shapes" and args.pretrained_model_name_or_path == str(TINY_SD)
    for foreign in ("a/b", "segmind/tiny-sd"):
        with pytest.raises(UsageError, match="--dataset_name shapes"):
            use_embedded_default(parser.parse_args(["--pretrained_model_name_or_path", foreign]))
    for name, parent in (("student", "/elsewhere/assets/tiny-sd"), ("its_student", str(tmp_path / "student"))):
        (tmp_path / name).mkdir()
        write_distillation(tmp_path / name, parent=parent, guidance="baked", guidance_scale=1.0)
        args = parser.parse_args(["--pretrained_model_name_or_path", str(tmp_path / name)])
        use_embedded_default(args)
        assert args.dataset_name == "shapes"


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_every_configuration(path):
    assert load_config_from_file(str(path)).num_processes >= 1


# Models


def test_what_is_no_pipeline_is_one_sentence(tmp_path, pipelines):
    for path, said in ((tmp_path, "model_index.json"), ("./nowhere", "no such folder"), ("a/b", "a/b")):
        with pytest.raises(ModelError, match=said) as error:
            read_pipeline_config(path)
        assert "\n" not in str(error.value)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", "_diffusers_version": "0"}))
    with pytest.raises(ModelError, match="it is a FluxPipeline"):
        read_pipeline_config(tmp_path)


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
NO_BETAS = [
    ("EDMEulerScheduler", {}, "EDMEulerScheduler, has no betas"),
    ("FlowMatchEulerDiscreteScheduler", {}, "FlowMatchEulerDiscreteScheduler, has no betas"),
    ("DPMSolverMultistepScheduler", FLOW, "prediction_type is 'flow_prediction'"),
    ("DDIMScheduler", {"beta_schedule": "no_such"}, "no_such"),
    ("NoSuchScheduler", {}, "NoSuchScheduler"),
]


@pytest.mark.parametrize("name, config, said", NO_BETAS, ids=[name for name, _, _ in NO_BETAS])
def test_other_noise_schedules_are_refused_before_weights_load(tmp_path, pipelines, name, config, said):
    folder = tmp_path / "pipeline"
    shutil.copytree(pipelines(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", name]}))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": name, **config}))
    with pytest.raises(ModelError, match=said) as error:
        load_pipeline(folder)
    assert str(error.value).startswith("--pretrained_model_name_or_path") and "\n" not in str(error.value)


def test_native_resolution_is_read_from_the_configs(pipelines):
    assert read_pipeline_config(pipelines("sd"))[1:] == (32, 4)


def test_everything_loaded_is_frozen(pipelines):
    pipeline = load_pipeline(pipelines("sdxl"))
    parts = [pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2]
    assert not any(part.training or p.requires_grad for part in parts for p in part.parameters())
    assert all(p.dtype == torch.float32 for part in parts for p in part.parameters())


# LPIPS


def test_lpips_takes_its_trunk_from_a_file(tmp_path):
    trunk = save_random_vgg16(tmp_path / "vgg16.safetensors")
    network = load_lpips(tmp_path / "vgg16.safetensors")
    assert torch.equal(network.net.slice1[0].weight, trunk[0].weight)
    assert torch.equal(network.net.slice5[-2].weight, trunk[28].weight)
    a, b = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    assert network(a, a).abs().max() == 0 and network(a, b).min() > 0
    (tmp_path / "broken.pth").write_text("no")
    with pytest.raises(ValueError, match="--lpips_trunk_path"):
        load_lpips(tmp_path / "broken.pth")


# Pictures


def test_grids_are_labelled_and_enlarge_small_images():
    from PIL import Image

    rows = [[Image.new("RGB", (32, 32), "red")] * 3] * 2
    grid = image_grid(rows, ["a small red circle " * 8, "b"], ["1", "2", "3"])
    assert grid.width > 3 * 96 and grid.height > 2 * 96
