"""kill -9 at any moment, then resume: no checkpoint is lost, nothing torn is visible, and the end is the same."""

import json
import random
import re
import shutil
import signal
from pathlib import Path

import pytest
from conftest import ROOT, fork
from launching import assert_same, every_script, flags, inside

from common.checkpoint import checkpoints_in, damage_of

FAULTY = Path(__file__).parent / "faulty.py"
OUTPUTS = ("final", "final-fp16", "best", "student")


def start(tmp_path, name, arguments, **fault):
    said = tmp_path / "said.txt"
    said.unlink(missing_ok=True)
    return fork(FAULTY, json.dumps(fault), ROOT / f"{name}.py", *arguments, output=said), said


def check_what_is_visible(run):
    """Whatever has its name is whole: a checkpoint by its checksums, an output by the last file that is written."""
    for _, checkpoint in checkpoints_in(run):
        assert damage_of(checkpoint) is None
    for output in [run / name for name in OUTPUTS if (run / name).is_dir()] + list(run.glob("stage-*")):
        assert (output / "README.md").is_file() or (output / "compression.json").is_file(), output


@pytest.mark.fault(
    "kill -9 at any file operation, then resume", "goes on from the last checkpoint, bit for bit the same"
)
@every_script
def test_kill_9_anywhere_and_resume(pipelines, uninterrupted, tmp_path, name, rounds):
    """In saving, retention, validation and export too: moments are drawn among all that touch the run's files."""
    folder = tmp_path / "run"
    shown = ["--validation_prompts", "a ring", "--validation_steps", 3, "--num_validation_images", 1]
    arguments = flags(pipelines, name, folder, *shown, "--export", "fp16", "--checkpoints_total_limit", 2)
    arguments += ["--checkpointing_steps", 1, "--resume_from_checkpoint", "latest"]
    moments, operations = random.Random(name), 60
    for number in range(rounds):
        run = inside(name, folder)
        best = max((step for step, _ in checkpoints_in(run)), default=0)
        moment = {"kill_at": moments.randint(1, operations), "after_ms": moments.choice([0, 1, 10, 50])}
        process, said = start(tmp_path, name, arguments, within=str(folder), **moment)
        code = process.wait()
        assert code in (0, -signal.SIGKILL), said.read_text()[-2000:]
        check_what_is_visible(run)
        assert max((step for step, _ in checkpoints_in(run)), default=0) >= best, f"round {number}: one was lost"
        if code == 0:  # it came to its end before the moment: know how many there are, and take a step back
            operations = int(re.search(r"file operations: (\d+)", said.read_text())[1])
            shutil.rmtree(checkpoints_in(run)[-1][1])
    process, said = start(tmp_path, name, arguments, kill_at=-1, after_ms=0, within=str(folder))
    assert process.wait() == 0, said.read_text()[-2000:]
    assert_same(name, folder, uninterrupted(name))
    run = inside(name, folder)
    check_what_is_visible(run)
    assert (run / "final-fp16").is_dir() and not list(run.glob(".*.tmp"))
