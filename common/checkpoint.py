"""Checkpoints: atomic checkpoint-N folders, resume, retention, and folders that hold one run each.

A checkpoint is visible only when it is complete: all ranks write into a hidden folder, rank 0 renames it. It holds no
random states: everything random is derived from (seed, step, index); see common/randomness.py.
"""

import contextlib
import json
import math
import os
import pickle
import re
import shutil
import socket
import tempfile
import zlib
from pathlib import Path

from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError

from common.contract import CONTRACT
from common.errors import CheckpointError, first_line
from common.identity import check_same
from common.stopping import STOPPED_MARK

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

STATE = "state.json"  # {step, max_train_steps, global_batch_size, split, arguments, state, files}: written last
LOCK = ".lock"
# What a run writes, by exact names: nothing else is ever removed. Beside these its own hidden temporaries.
_WRITTEN = re.compile(r"checkpoint-\d+|stage-\d+|final|final-(?:fp16|int8|fp8)")
_TEMPORARY = re.compile(r"\.(checkpoint-\d+|stage-\d+|final|final-(?:fp16|int8|fp8)|best|student)(\.old)?\.tmp")
_PROVEN = ("best", "student")  # of train_student_kd.py: words that others use too, so by their contract


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

    "latest" takes the newest complete one that is not damaged, and says which are, and is a fresh start where there
    is none; a path or a name such as checkpoint-10 must exist, complete and undamaged (CheckpointError).
    """
    if resume_from_checkpoint is None:
        return None
    if resume_from_checkpoint == "latest":
        found, damages = checkpoints_in(folder), []
        while found and (damage := damage_of(found[-1][1])):
            damages.append(damage)
            found.pop()
        if damages and not found:
            raise CheckpointError(
                f"{damages[-1]}: there is no checkpoint before it; start again in another --run_name."
            )
        for damage in damages:
            print(f"warning: {damage}: it is set aside, and the one before it is used.", flush=True)
        return found[-1][1] if found else None
    for path in (Path(resume_from_checkpoint), Path(folder) / resume_from_checkpoint):
        if (path / STATE).is_file():
            if damage := damage_of(path):
                raise CheckpointError(f"{damage}: resume from another checkpoint.")
            return path
    raise CheckpointError(
        f"--resume_from_checkpoint {resume_from_checkpoint}: there is no complete checkpoint of that name, "
        f"neither as a path nor in {folder}; 'latest' takes the newest one."
    )


def damage_of(checkpoint):
    """What a complete checkpoint lacks of what was written into it, as the beginning of a sentence, or None."""
    try:
        written = read_state(checkpoint).get("files", {})  # an older checkpoint has none
    except CheckpointError as error:
        return str(error).partition(":")[0]
    for name, (size, checksum) in written.items():
        file = Path(checkpoint) / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != size:
            return f"{file} has {file.stat().st_size} bytes instead of {size}"
        if _checksum(file) != checksum:
            return f"{file} is damaged: its checksum is wrong"
    return None


def _checksum(file):
    checksum = 0
    with open(file, "rb") as opened:
        while chunk := opened.read(2**22):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def refuse_other_run(folder, checkpoint, overwrite, resume_from_checkpoint=None):
    """Raise CheckpointError where a fresh run would start in a folder that holds another run. Reads only.

    A run that is to be resumed may have been killed before its first checkpoint, when there was its student alone.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"--output_dir: {folder} is a file, not a folder.")
    held = _run_folders(folder)
    if resume_from_checkpoint == "latest" and [path.name for path in held] == ["student"]:
        return
    elsewhere = checkpoint is None or Path(checkpoint).resolve().parent != folder.resolve()
    if held and elsewhere and not overwrite:
        raise CheckpointError(
            f"{folder} already holds a run ({held[0].name}): continue it with --resume_from_checkpoint latest, "
            "start another with --run_name or --output_dir, or discard it with --overwrite_output_dir."
        )


_locks = []  # (path, open file) that this process holds


def lock_folder(folder):
    """Let one run at a time write into a folder: by a lock of the system's, which ends with the process that holds it.

    The file says who holds it. Raises CheckpointError where another process does.
    """
    path = Path(folder) / LOCK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")
    except OSError as error:
        raise CheckpointError(f"--output_dir: {folder} can't be made or written ({error.strerror}).") from None
    file.seek(0)
    holder = file.read().strip()
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise CheckpointError(
            f"{folder}: another run is writing there ({holder}): wait for it or stop it, or give this one another "
            "--run_name or --output_dir."
        ) from None
    except OSError:  # a file system without locks
        pass
    mine = f"process {os.getpid()} on {socket.gethostname()}"
    if holder not in ("", mine):
        print(f"{folder}: taken over from {holder}, which ended without a word.", flush=True)
    file.truncate(0)
    file.write(mine)
    file.flush()
    _locks.append((path, file))


def release_locks():
    """Where a run has ended, however it has."""
    while _locks:
        path, file = _locks.pop()
        with contextlib.suppress(OSError):
            path.unlink()
        file.close()


def make_folder(folder, checkpoint, resume_from_checkpoint=None):
    """Make the run's folder, without torn saves and without what the run (re)started here will write again.

    A fresh start discards an overwritten run; resuming an older checkpoint discards the later ones, but sets those
    aside that "latest" has passed over: they are damaged, and a person might mend them. One process only.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CheckpointError(f"--output_dir: {folder} can't be made or written ({error.strerror}).") from None
    stale = _run_folders(folder)
    if checkpoint and Path(checkpoint).resolve().parent == folder.resolve():
        resumed = read_state(checkpoint)["step"]
        stale = [path for path in stale if path.name.startswith("checkpoint-")]
        stale = [path for path in stale if not (path / STATE).is_file() or int(path.name[11:]) > resumed]
    for path in stale:
        if checkpoint and resume_from_checkpoint == "latest" and (path / STATE).is_file():
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)
        else:
            _remove(path)
    (folder / STOPPED_MARK).unlink(missing_ok=True)
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _remove(path):
    """Delete a visible folder: hidden first, so that a kill in between leaves nothing that looks complete."""
    hidden = path.with_name(f".{path.name}.old.tmp")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _run_folders(folder):
    """The folders in `folder` that a run wrote, by their exact names."""
    found = [path for path in Path(folder).glob("*") if path.is_dir() and _WRITTEN.fullmatch(path.name)]
    found += [path for path in (Path(folder) / name for name in _PROVEN) if (path / CONTRACT).is_file()]
    return sorted(found)


def read_state(checkpoint):
    """state.json of a checkpoint: {"step", "max_train_steps", "global_batch_size", "split", "arguments", "state"}.

    Raises CheckpointError where it can't be read.
    """
    file = Path(checkpoint) / STATE
    try:
        saved = json.loads(file.read_text())
        return {**saved, "step": int(saved["step"]), "arguments": dict(saved["arguments"]), "state": saved["state"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} can't be read ({type(error).__name__}: {first_line(error)}): resume from another checkpoint."
        ) from None


def check_same_run(checkpoint, arguments, global_batch_size):
    """CheckpointError where an argument that changes the maths has changed; says which places have.

    arguments: of identity.identity_of. How the global batch is split over processes and accumulation changes nothing,
    so only its size is compared; a longer --max_train_steps is no change either.
    """
    state = read_state(checkpoint)
    saved = {**state["arguments"], "global batch size": state.get("global_batch_size")}
    for moved in check_same(checkpoint, saved, {**arguments, "global batch size": global_batch_size}):
        print(moved, flush=True)


def split_as_before(checkpoint, train_batch_size, processes, accumulation_steps):
    """(batch size, processes, accumulation steps) of a continuation: as asked for, or, by other processes, as before.

    With another number of processes the global batch stays what it was: with more or fewer accumulated micro-batches,
    of the size asked for or the next smaller one that divides it. Says so. Raises CheckpointError where it can't.
    """
    saved, asked = read_state(checkpoint), [train_batch_size, processes, accumulation_steps]
    before, wanted = saved.get("split"), saved.get("global_batch_size")
    if before is None or before[1] == processes or math.prod(asked) == wanted:
        found = asked
    elif wanted % processes:
        raise CheckpointError(
            f"--resume_from_checkpoint: {checkpoint} has a global batch of {wanted}, which {processes} processes "
            f"can't share: take a number that divides it, such as {before[1]}."
        )
    else:
        share = wanted // processes
        size = next(size for size in range(min(train_batch_size, share), 0, -1) if share % size == 0)
        found = [size, processes, share // size]
    if before is not None and found != before:
        was, now = (f"{size} x {number} processes x {steps} accumulated" for size, number, steps in (before, found))
        print(f"The global batch stays {wanted}, and its order: it was {was}, and is {now}.", flush=True)
    return found


def save_checkpoint(accelerator, folder, step, write, described, total_limit=None):
    """Write checkpoint-`step` atomically, then prune to `total_limit`. Every rank must call it.

    write(folder) writes tensors, every rank its own; described: {name: value} of what STATE holds beside the step.
    Raises CheckpointError, on every rank, where it can't be written; what was written of it is removed.
    """
    final = Path(folder) / f"checkpoint-{step}"
    temporary = Path(folder) / f".checkpoint-{step}.tmp"
    if (final / STATE).is_file():
        return final
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    failed = None
    try:
        write(str(temporary))  # it makes the folder
    except (OSError, RuntimeError, SafetensorError) as error:  # a disk that is full, in the words of three libraries
        failed = f"{type(error).__name__}: {first_line(error)}"
    failed = next((failure for failure in gather_object([failed]) if failure), None)
    if accelerator.is_main_process and not failed:
        for path in temporary.glob("random_states_*.pkl"):  # accelerate's, and a pickle that nobody needs
            path.unlink()
        files = {path.name: [path.stat().st_size, _checksum(path)] for path in temporary.iterdir()}
        saved = {"step": step, **described, "files": files}
        try:
            (temporary / STATE).write_text(json.dumps(saved, indent=2) + "\n")
            os.replace(temporary, final)
        except OSError as error:
            failed = str(error)
    failed = broadcast_object_list([failed])[0]
    if failed:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(folder).free / 2**20
        raise CheckpointError(
            f"checkpoint-{step} can't be written into {folder} ({failed}; {free:.0f} MiB are free there)."
        )
    if accelerator.is_main_process and total_limit is not None:
        for _, path in checkpoints_in(folder)[: -max(total_limit, 1)]:
            _remove(path)
    accelerator.wait_for_everyone()
    return final


def load_checkpoint(accelerator, checkpoint, read):
    """Load what save_checkpoint wrote into the prepared objects, by read(folder). Every rank must call it."""
    try:
        read(str(checkpoint))
    except CheckpointError:
        raise
    except (OSError, EOFError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{checkpoint} does not load ({type(error).__name__}: {first_line(error)}): resume from "
            "another checkpoint."
        ) from None
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
