"""Runs on real machines: signals, disks, damaged checkpoints, two runs in one folder, places that move."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import ROOT, fork, read_json, run_in_process
from launching import QUICK, SHAPES, assert_same, each, error_of, flags, fork_and_wait, quick, start_from, wait_for
from PIL import Image

import train_guided
from common.checkpoint import checkpoints_in, damage_of, lock_folder, release_locks
from common.errors import CheckpointError
from common.identity import fingerprint
from common.stopping import STOPPED

FAULTY = Path(__file__).parent / "faulty.py"
SCRIPT = ROOT / "train_guided.py"
pytestmark = pytest.mark.xdist_group("train_guided")  # whose uninterrupted run they share


def faulty(tmp_path, fault, arguments):
    """(exit status, what was said) of a run of train_guided.py with a fault of faulty.py."""
    process = fork(FAULTY, json.dumps(fault), SCRIPT, *arguments, output=tmp_path / "said.txt")
    return process.wait(), (tmp_path / "said.txt").read_text()


def sentence_in(said):
    (line,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert "Traceback" not in said
    return line


# Signals


@pytest.mark.fault("SIGTERM to one of two processes", "both save the same step and end with status 75")
def test_sigterm_to_one_rank_stops_all(pipelines, tmp_path):
    arguments = flags(pipelines, "train_guided", tmp_path / "run", "--batch_size", 2, steps=100000)
    process = fork(SCRIPT, *arguments, processes=2, output=tmp_path / "said.txt")
    wait_for((tmp_path / "run/checkpoint-2/state.json").is_file, process)
    os.kill(process.pids[1], signal.SIGTERM)
    assert process.wait() == STOPPED and set(process._codes.values()) == {STOPPED}
    last, checkpoint = checkpoints_in(tmp_path / "run")[-1]
    assert damage_of(checkpoint) is None and f"after step {last};" in (tmp_path / "said.txt").read_text()


@pytest.mark.fault("Ctrl-C twice", "the second interrupts at once; older checkpoints stay")
def test_sigint_twice_interrupts(pipelines, tmp_path):
    arguments = flags(pipelines, "train_guided", tmp_path / "run", steps=100000)
    process = fork(SCRIPT, *arguments, output=tmp_path / "said.txt")
    wait_for((tmp_path / "run/checkpoint-2/state.json").is_file, process)
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
    assert process.returncode in (STOPPED, 130, 1, -signal.SIGINT)
    assert all(damage_of(checkpoint) is None for _, checkpoint in checkpoints_in(tmp_path / "run"))


# Damaged checkpoints


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "a bit of the weights flipped": ("student.safetensors", flip),
    "a bit of the optimizer flipped": ("optimizer.bin", flip),
    "the average cut": ("student_ema.safetensors", lambda file: os.truncate(file, 50)),
    "the optimizer missing": ("optimizer.bin", Path.unlink),
    "the state cut": ("state.json", lambda file: os.truncate(file, 50)),
}


@each(DAMAGES, "resume from a damaged checkpoint: {}", "said; the one before is used, the damaged one set aside")
def test_a_damaged_checkpoint_is_said_and_the_one_before_is_used(pipelines, uninterrupted, tmp_path, capsys, case):
    name, spoil = DAMAGES[case]
    for checkpoint in ("checkpoint-2", "checkpoint-4"):
        start_from("train_guided", uninterrupted("train_guided"), tmp_path, checkpoint)
    spoil(tmp_path / "checkpoint-4" / name)
    arguments = flags(pipelines, "train_guided", tmp_path)
    assert "checkpoint-4" in error_of(train_guided, [*arguments, "--resume_from_checkpoint", "checkpoint-4"], capsys)
    run_in_process(train_guided, *arguments, "--resume_from_checkpoint", "latest")
    said = capsys.readouterr().out
    assert "warning: " in said and f"checkpoint-4/{name}" in said and "Resuming from" in said
    assert (tmp_path / "checkpoint-4.damaged").is_dir()
    assert_same("train_guided", tmp_path, uninterrupted("train_guided"))


@pytest.mark.fault("resume where every checkpoint is damaged", "refused: nothing starts over what may be mended")
def test_where_all_are_damaged_nothing_starts_anew(pipelines, uninterrupted, tmp_path, capsys):
    start_from("train_guided", uninterrupted("train_guided"), tmp_path)
    flip(tmp_path / "checkpoint-2/optimizer.bin")
    arguments = flags(pipelines, "train_guided", tmp_path, "--resume_from_checkpoint", "latest")
    error = error_of(train_guided, arguments, capsys)
    assert "optimizer.bin is damaged" in error and "no checkpoint before it" in error
    assert (tmp_path / "checkpoint-2").is_dir()


# Disks


@pytest.mark.fault("the disk fills up while a checkpoint is saved", "said, the torn folder removed; the run goes on")
def test_a_full_disk_at_a_save_costs_a_checkpoint_not_the_run(pipelines, tmp_path, monkeypatch, capsys):
    from accelerate import Accelerator

    import common.checkpoint as checkpoint

    save, calls = Accelerator.save_state, []

    def full(accelerator, folder):
        save(accelerator, folder)
        calls.append(folder)
        if len(calls) == 1:
            raise RuntimeError("basic_ios::clear: iostream error")  # what torch says then

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 9, 0))
    monkeypatch.setattr(Accelerator, "save_state", full)
    run_in_process(train_guided, *flags(pipelines, "train_guided", tmp_path))
    said = capsys.readouterr().out
    assert "warning: checkpoint-2 can't be written" in said and "iostream error; 0 MiB are free" in said
    assert [step for step, _ in checkpoints_in(tmp_path)] == [4] and not list(tmp_path.glob(".*.tmp"))


@pytest.mark.fault("the disk is full at the last save", "one sentence with what is free; no torn folder stays")
def test_a_disk_that_stays_full_is_one_sentence(pipelines, tmp_path):
    """Real: no file may grow beyond a limit, so that each library fails in its own way."""
    arguments = flags(pipelines, "train_guided", tmp_path / "run")
    code, said = faulty(tmp_path, {"limit": 20000}, arguments)
    assert code == 2 and "checkpoint-4 can't be written into" in sentence_in(said)
    assert not list((tmp_path / "run").glob(".*.tmp")) and not checkpoints_in(tmp_path / "run")


@pytest.mark.fault("the disk is full at the export", "one sentence; checkpoints and final/ stay, no torn folder does")
def test_a_full_disk_at_the_export(pipelines, uninterrupted, tmp_path):
    run = tmp_path / "run"
    start_from("train_guided", uninterrupted("train_guided"), run, "checkpoint-4")
    limit = max(file.stat().st_size for file in (run / "checkpoint-4").iterdir()) // 4
    arguments = flags(pipelines, "train_guided", run, "--resume_from_checkpoint", "latest", "--export", "fp16")
    code, said = faulty(tmp_path, {"limit": limit}, arguments)
    assert code == 2 and sentence_in(said)
    assert checkpoints_in(run)[-1][0] == 4 and not list(run.glob(".*.tmp"))
    assert not (run / "final").exists()


# Two runs, other places


@pytest.mark.fault("two runs started in one folder", "the second is refused, and told which process is writing there")
def test_a_second_run_in_a_folder_that_is_written_is_refused(pipelines, tmp_path):
    arguments = flags(pipelines, "train_guided", tmp_path / "run", steps=100000)
    first = fork(SCRIPT, *arguments, output=tmp_path / "first.txt")
    wait_for((tmp_path / "run/checkpoint-2/state.json").is_file, first)
    for more in (["--resume_from_checkpoint", "latest"], ["--overwrite_output_dir"]):
        second = fork(SCRIPT, *arguments, *more, output=tmp_path / "second.txt")
        assert second.wait() == 2
        said = sentence_in((tmp_path / "second.txt").read_text())
        assert f"another run is writing there (process {first.pid} on " in said
        (tmp_path / "second.txt").unlink()
    assert first.poll() is None
    first.send_signal(signal.SIGTERM)
    assert first.wait() == STOPPED and not (tmp_path / "run/.lock").exists()


@pytest.mark.fault("a run where a killed one has left its lock", "the folder is taken over, and that is said")
def test_the_lock_of_a_dead_run_is_taken_over(tmp_path, capsys):
    (tmp_path / ".lock").write_text("process 4242 on elsewhere")
    lock_folder(tmp_path)
    assert "taken over from process 4242 on elsewhere, which ended without a word" in capsys.readouterr().out
    release_locks()
    assert not (tmp_path / ".lock").exists()
    with pytest.raises(CheckpointError, match="can't be made or written"):
        lock_folder("/dev/null/run")


def pictures(folder):
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (32, 32), (60 * number, 30, 30)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a cat")


@pytest.mark.fault("resume where data and model lie elsewhere now", "still the same run, and the move is said")
def test_what_moved_is_still_the_same_run(pipelines, tmp_path, capsys):
    pictures(tmp_path / "job1")
    shutil.copytree(pipelines(), tmp_path / "model1")
    for job, steps in (("1", 1), ("2", 2)):
        if job == "2":
            (tmp_path / "job1").rename(tmp_path / "job2")
            (tmp_path / "model1").rename(tmp_path / "model2")
        arguments = [*QUICK, "--pretrained_model_name_or_path", tmp_path / f"model{job}"]
        arguments += ["--output_dir", tmp_path / "run"]
        arguments += ["--data_dir", tmp_path / f"job{job}", "--max_steps", steps, "--resume_from_checkpoint", "latest"]
        run_in_process(train_guided, *arguments)
    said = capsys.readouterr().out
    assert f"--data_dir: {tmp_path}/job2 is what was {tmp_path}/job1." in said
    assert f"--pretrained_model_name_or_path: {tmp_path}/model2 is what was {tmp_path}/model1." in said
    (tmp_path / "job2/4.txt").write_text("a dog")
    error = error_of(train_guided, [*arguments, "--max_steps", 3], capsys)
    assert f"data_dir {tmp_path}/job2 holds something else now" in error


def test_a_fingerprint_is_of_names_sizes_and_bytes(tmp_path):
    folder, seen = tmp_path / "a", set()
    folder.mkdir()
    for change in ("one.png", "two.txt", "weights.safetensors"):
        (folder / change).write_bytes(b"x" * 300_000)
        seen.add(fingerprint(folder))
    flip(folder / "weights.safetensors")
    seen.add(fingerprint(folder))
    (folder / "README.md").write_text("only for people")
    (folder / ".hidden").write_text("")
    assert len(seen) == 4 and fingerprint(folder) in seen
    shutil.copytree(folder, tmp_path / "b")
    assert fingerprint(tmp_path / "b") == fingerprint(folder)


# Everything else that machines do


@pytest.mark.fault("the tracker fails while it trains", "said once; the run goes on without it")
def test_a_tracker_that_fails_ends_no_run(pipelines, tmp_path):
    arguments = flags(pipelines, "train_guided", tmp_path / "run", "--report_to", "tensorboard")
    code, said = faulty(tmp_path, {"tracker": True}, arguments)
    assert code == 0 and said.count("warning: --report_to tensorboard failed (the tracker's server is gone)") == 1
    assert (tmp_path / "run/final").is_dir()


@pytest.mark.fault("the clock jumps back", "nothing depends on it")
def test_a_clock_that_jumps(pipelines, uninterrupted, tmp_path):
    code, said = faulty(tmp_path, {"clock": True}, flags(pipelines, "train_guided", tmp_path / "run"))
    assert code == 0, said[-2000:]
    assert_same("train_guided", tmp_path / "run", uninterrupted("train_guided"))


@pytest.mark.fault("a home that can't be written, no terminal, stdin closed", "it trains")
def test_a_home_that_cannot_be_written(pipelines, tmp_path, monkeypatch):
    for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "TORCH_HOME", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, "/dev/null/nowhere")
    fork_and_wait(tmp_path, SCRIPT, *flags(pipelines, "train_guided", tmp_path / "run", steps=1))
    assert (tmp_path / "run/final").is_dir()


@pytest.mark.fault("an image that can't be read on one of two processes", "named; too many end the run in a sentence")
def test_broken_images_on_one_rank(pipelines, tmp_path):
    pictures(tmp_path / "data")
    for number in range(4):
        (tmp_path / f"data/{number}.png").write_bytes(b"broken")
    model = ["--pretrained_model_name_or_path", pipelines(), "--data_dir", tmp_path / "data"]
    arguments = [*QUICK, *model, "--max_steps", 2, "--output_dir", tmp_path / "run", "--batch_size", 2]
    process = fork(SCRIPT, *arguments, processes=2, output=tmp_path / "said.txt")
    began = time.time()
    assert process.wait() == 2 and time.time() - began < 120
    assert "images of --data_dir" in (tmp_path / "said.txt").read_text()


@pytest.mark.fault("a seed of more than 32 bits", "it trains; one of more than 63 is refused")
def test_large_seeds(pipelines, tmp_path, capsys):
    run_in_process(train_guided, *quick(pipelines, tmp_path, "--seed", 2**32, steps=1, data=SHAPES))
    assert read_json(tmp_path / "checkpoint-1/state.json")["arguments"]["seed"] == 2**32
    with pytest.raises(SystemExit):
        train_guided.parse_args(["--seed", str(2**63)])
    assert "more than 63 bits" in capsys.readouterr().err
