"""Checkpoints: atomic checkpoint-N folders, resume, retention, signals, and folders that hold one run each.

A checkpoint is visible only when it is complete: all ranks write into a hidden folder, rank 0 renames it. It holds no
random states: everything random is derived from (seed, step, index); see common/data.py.
"""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import torch

STATE = "state.json"  # {step, max_train_steps, global_batch_size, arguments}: written last: it marks a complete one


class CheckpointError(ValueError):
    """A folder that can't be started in or resumed from, in one sentence."""


def checkpoints_in(folder):
    """The complete checkpoints of a run folder as a list of (step, path), oldest first."""
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and (path / STATE).is_file():
            found.append((int(match.group(1)), path))
    return sorted(found)


def find_checkpoint(folder, resume_from_checkpoint):
    """The checkpoint folder that --resume_from_checkpoint names, or None for a fresh start.

    "latest" takes the newest complete one and is a fresh start where there is none; a path or a name such as
    checkpoint-10 must exist and be complete (CheckpointError).
    """
    if resume_from_checkpoint is None:
        return None
    if resume_from_checkpoint == "latest":
        found = checkpoints_in(folder)
        return found[-1][1] if found else None
    for path in (Path(resume_from_checkpoint), Path(folder) / resume_from_checkpoint):
        if (path / STATE).is_file():
            return path
    raise CheckpointError(
        f"--resume_from_checkpoint {resume_from_checkpoint}: there is no complete checkpoint of that name, "
        f"neither as a path nor in {folder}; 'latest' takes the newest one."
    )


def refuse_other_run(folder, checkpoint, overwrite):
    """Raise CheckpointError where a fresh run would start in a folder that holds another run. Reads only."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"--output_dir: {folder} is a file, not a folder.")
    held = _run_folders(folder)
    elsewhere = checkpoint is None or Path(checkpoint).resolve().parent != folder.resolve()
    if held and elsewhere and not overwrite:
        raise CheckpointError(
            f"{folder} already holds a run ({held[0].name}): continue it with --resume_from_checkpoint latest, "
            "start another with --run_name or --output_dir, or discard it with --overwrite_output_dir."
        )


def make_folder(folder, checkpoint):
    """Make the run's folder, without torn saves and without what the run (re)started here will write again.

    A fresh start discards an overwritten run; resuming an older checkpoint discards the later ones. One process only.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"--output_dir: {folder} can't be made ({error.strerror}).") from None
    stale = [] if checkpoint else _run_folders(folder)
    if checkpoint and Path(checkpoint).resolve().parent == folder.resolve():
        resumed = json.loads((Path(checkpoint) / STATE).read_text())["step"]
        stale = [path for path in folder.glob("checkpoint-*") if not (path / STATE).is_file()]
        stale += [path for step, path in checkpoints_in(folder) if step > resumed]
    for path in stale:
        _remove(path)
    for path in folder.glob(".*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _remove(path):
    """Delete a visible folder: hidden first, so that a kill in between leaves nothing that looks complete."""
    hidden = path.with_name(f".{path.name}.old.tmp")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _run_folders(folder):
    names = ("checkpoint-", "final")
    return sorted(path for path in Path(folder).glob("*") if path.is_dir() and path.name.startswith(names))


def check_same_run(checkpoint, arguments, global_batch_size):
    """Refuse to resume `checkpoint` where an argument that changes the maths has changed. Raises CheckpointError.

    arguments: dict of those arguments only. How the global batch is split over processes and accumulation changes
    nothing, so only its size is compared; a longer --max_train_steps is no change either.
    """
    state = json.loads((Path(checkpoint) / STATE).read_text())
    current = {**json.loads(json.dumps(arguments)), "global batch size": global_batch_size}
    saved = {**state["arguments"], "global batch size": state["global_batch_size"]}
    changed = [name for name in sorted(current.keys() | saved.keys()) if current.get(name) != saved.get(name)]
    if changed:
        details = "; ".join(f"{name} was {saved.get(name)}, now {current.get(name)}" for name in changed)
        raise CheckpointError(f"{checkpoint} belongs to a run with other arguments: {details}.")
    return state["step"]


def planned_steps(checkpoint):
    """The --max_train_steps of the run that wrote `checkpoint`, or None where an older version wrote it."""
    return json.loads((Path(checkpoint) / STATE).read_text()).get("max_train_steps")


def save_checkpoint(accelerator, folder, step, arguments, global_batch_size, max_train_steps, total_limit=None):
    """Write checkpoint-`step` atomically, then prune to `total_limit`. Every rank must call it."""
    final = Path(folder) / f"checkpoint-{step}"
    temporary = Path(folder) / f".checkpoint-{step}.tmp"
    if (final / STATE).is_file():
        return final
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for path in temporary.glob("random_states_*.pkl"):  # accelerate's, and a pickle that nobody needs
            path.unlink()
        state = {"step": step, "max_train_steps": max_train_steps, "global_batch_size": global_batch_size,
                 "arguments": arguments}  # fmt: skip
        (temporary / STATE).write_text(json.dumps(state, indent=2) + "\n")
        os.replace(temporary, final)
        if total_limit is not None:
            for _, path in checkpoints_in(folder)[: -max(total_limit, 1)]:
                _remove(path)
    accelerator.wait_for_everyone()
    return final


def load_checkpoint(accelerator, checkpoint):
    """Load what save_checkpoint wrote into the prepared objects. Every rank must call it."""
    accelerator.load_state(str(checkpoint))
    # accelerate restores its micro-batch counter too, which would shift accumulation when the split has changed.
    accelerator.step = 0


class FinalFolder:
    """`with FinalFolder(path) as temporary:` writes a folder that appears (or replaces another) only if complete."""

    def __init__(self, path):
        self.path = Path(path)
        self.temporary = self.path.with_name(f".{self.path.name}.tmp")

    def __enter__(self):
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        return self.temporary

    def __exit__(self, kind, *_):
        if kind is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
            return
        old = self.path.with_name(f".{self.path.name}.old.tmp")
        shutil.rmtree(old, ignore_errors=True)
        if self.path.exists():
            os.replace(self.path, old)
        os.replace(self.temporary, self.path)
        shutil.rmtree(old, ignore_errors=True)


class StopSignal:
    """Notes SIGTERM and SIGINT so that a run can save at the next step; a second SIGINT interrupts at once."""

    def __init__(self):
        self.received = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number, frame):
        if self.received == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def requested(self, accelerator):
        """Whether ANY rank was signalled: all ranks get the same answer, so that they save the same step together."""
        if accelerator.num_processes == 1:
            return self.received is not None
        flag = torch.tensor([0 if self.received is None else 1], device=accelerator.device)
        return bool(accelerator.reduce(flag, reduction="sum").item())
