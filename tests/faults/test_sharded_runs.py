"""Runs whose processes each write a part of a checkpoint: killed, stopped, robbed of a part, shared otherwise."""

import os
import shutil
import signal

import pytest
from conftest import ROOT, engine_environment, fork
from launching import error_of, flags, fork_and_wait, wait_for

import train_guided
from common.checkpoint import checkpoints_in, damage_of
from common.stopping import STOPPED

SCRIPT = ROOT / "train_guided.py"
PART = "student-00001-of-00002.safetensors"
pytestmark = pytest.mark.xdist_group("train_guided_sharded")


@pytest.fixture(scope="module")
def fsdp2():
    """What accelerate launch tells a script with accelerate_configs/fsdp2.yaml."""
    return engine_environment("fsdp2", "--mixed_precision", "no")


@pytest.fixture(scope="module")
def written(pipelines, fsdp2, tmp_path_factory):
    """A folder of four steps of two processes, with the checkpoints 2 and 4 in it."""
    folder = tmp_path_factory.mktemp("sharded")
    line = flags(pipelines, "train_guided", folder / "run", "--batch_size", 2)
    fork_and_wait(folder, SCRIPT, *line, processes=2, told=fsdp2)
    return folder / "run"


def resuming(pipelines, written, folder, *more):
    shutil.copytree(written, folder / "run")
    latest = ["--resume_from_checkpoint", "latest"]
    return flags(pipelines, "train_guided", folder / "run", "--batch_size", 2, *latest, *more, steps=5)


@pytest.mark.fault("kill -9 of one of two FSDP2 processes while it saves its part", "the one before it is whole")
def test_a_part_that_was_not_written_makes_no_checkpoint(pipelines, fsdp2, tmp_path):
    (tmp_path / "torn.py").write_text(TORN)
    line = flags(pipelines, "train_guided", tmp_path / "run", "--batch_size", 2)
    command = [tmp_path / "torn.py", SCRIPT, *line]
    process = fork(*command, processes=2, output=tmp_path / "torn.txt", told=fsdp2)
    assert process.wait() == -signal.SIGKILL
    assert [step for step, _ in checkpoints_in(tmp_path / "run")] == [2]
    fork_and_wait(tmp_path, SCRIPT, *line, "--resume_from_checkpoint", "latest", processes=2, told=fsdp2)
    assert [step for step, _ in checkpoints_in(tmp_path / "run")] == [2, 4]
    assert (tmp_path / "run/final").is_dir() and not list((tmp_path / "run").glob(".*.tmp"))


TORN = """
import os, runpy, signal, sys
import safetensors.torch
sys.argv[:] = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
from common import hooks
save = hooks.save_parts
def torn(folder, name, *rest):
    if os.environ["RANK"] == "1" and folder.endswith(".checkpoint-4.tmp") and name == "optimizer":
        os.kill(os.getpid(), signal.SIGKILL)
    save(folder, name, *rest)
hooks.save_parts = torn
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.fault("SIGTERM to one of two FSDP2 processes", "both save the same step, each its part, and end with 75")
def test_sigterm_to_one_of_two_saves_both_parts(pipelines, fsdp2, tmp_path):
    line = flags(pipelines, "train_guided", tmp_path / "run", "--batch_size", 2, "--max_steps", 100000)
    process = fork(SCRIPT, *line, processes=2, output=tmp_path / "said.txt", told=fsdp2)
    wait_for((tmp_path / "run/checkpoint-2/state.json").is_file, process)
    os.kill(process.pids[1], signal.SIGTERM)
    assert process.wait() == STOPPED and set(process._codes.values()) == {STOPPED}
    last, checkpoint = checkpoints_in(tmp_path / "run")[-1]
    assert damage_of(checkpoint) is None and f"after step {last};" in (tmp_path / "said.txt").read_text()


@pytest.mark.fault("a process's part of a checkpoint is gone or cut", "the checkpoint before it is used, and said")
def test_a_lost_part_is_no_checkpoint(pipelines, fsdp2, written, tmp_path):
    line = resuming(pipelines, written, tmp_path)
    file = tmp_path / "run/checkpoint-4" / PART
    content = file.read_bytes()
    file.write_bytes(content[:-8])
    assert damage_of(file.parent) == f"{file} has {len(content) - 8} bytes instead of {len(content)}"
    file.unlink()
    said = fork_and_wait(tmp_path, SCRIPT, *line, processes=2, told=fsdp2)
    assert f"{PART} is missing" in said
    assert "Resuming from" in said and "checkpoint-2." in said and (tmp_path / "run/checkpoint-5").is_dir()


@pytest.mark.fault("a run of two processes is resumed by three, which can't share its batch", "refused in a sentence")
def test_processes_that_can_not_share_the_batch(pipelines, fsdp2, written, tmp_path):
    line = resuming(pipelines, written, tmp_path)
    process = fork(SCRIPT, *line, processes=3, output=tmp_path / "said.txt", told=fsdp2)
    assert process.wait() == 2 and "which 3 processes can't share" in (tmp_path / "said.txt").read_text()
    assert [step for step, _ in checkpoints_in(tmp_path / "run")] == [2, 4]


@pytest.mark.fault("a LoRA's checkpoint is resumed as a whole UNet's, which parts hold", "refused by the flag's name")
def test_parts_of_another_run(pipelines, written, tmp_path, capsys):
    line = resuming(pipelines, written, tmp_path, "--lora_rank", 4, "--train_batch_size", 4)
    assert "lora_rank was None, now 4" in error_of(train_guided, line, capsys)
