"""A run: its processes, folder, identity and count of steps. What every training script does alike around its loop.

A script calls, in this order: `settle` (every refusal that files and flags allow, before anything loads), `open_run`,
`run.register` once its models stand, and in the loop `run.batches`, `run.add`, clip and step (common/optimization.py),
`run.count` and `run.save`. Nothing here calls back into a script.
"""

import contextlib
import math
import os
import secrets
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, gather_object
from safetensors import SafetensorError
from tqdm.auto import tqdm

from common import checkpoint as checkpoints
from common.engines import engine_of, local, open_accelerator
from common.errors import CheckpointError, UsageError, UserError, first_line
from common.hooks import WHOLE_OPTIMIZER, load_cut, register_checkpoint_hooks, save_cut
from common.hub import upload
from common.identity import identity_of
from common.memory import keep_freed_memory
from common.pipelines import compute_dtype
from common.randomness import seed_all
from common.stopping import STOPPED_MARK, Stopped, StopSignal
from common.timing import Phases, Profile, peak_memory

# Opening


def open_run(args, watch=None, subfolder=None, follows_length=(), staged=False):
    """The Run of these arguments: processes joined, folder made, checkpoint found, the same on every process.

    watch: of its memory, by `preflight`. subfolder: of the run's folder, where the script writes into one.
    follows_length: flags beside --lr_scheduler whose effect follows the length of the run, named in a warning where a
    resumed run has another one. staged: the learning rate follows the length of a stage instead. Raises UsageError and
    CheckpointError, on every process alike.
    """
    folder = Path(args.output_dir) / (args.run_name or "") / (subfolder or "")
    timeout = timedelta(seconds=args.ddp_timeout)
    # What is trained has no buffers that change, and its gradients need not lie in memory twice.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    accelerator = open_accelerator(
        args,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=folder,
        kwargs_handlers=[ddp],
    )
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")

    def decide():
        identity = {**identity_of(args), "mixed_precision": precision}
        checkpoint = checkpoints.find_checkpoint(folder, args.resume_from_checkpoint)
        split = [args.train_batch_size, accelerator.num_processes, args.gradient_accumulation_steps]
        if checkpoint:
            split = checkpoints.split_as_before(checkpoint, *split)
            checkpoints.check_same_run(checkpoint, identity, math.prod(split))
        checkpoints.lock_folder(folder)  # first: what another run has written by now counts
        checkpoints.refuse_other_run(folder, checkpoint, args.overwrite_output_dir, args.resume_from_checkpoint)
        checkpoints.make_folder(folder, checkpoint, args.resume_from_checkpoint)
        return checkpoint, checkpoints.read_state(checkpoint) if checkpoint else {}, identity, split

    checkpoint, saved, identity, split = on_main_process(accelerator, decide)
    args.train_batch_size, _, args.gradient_accumulation_steps = split
    accelerator.gradient_accumulation_steps = args.gradient_accumulation_steps
    check_shared(accelerator, folder, checkpoint)
    if args.resume_from_checkpoint:
        accelerator.print(
            f"Resuming from {checkpoint}." if checkpoint else f"No checkpoint in {folder}: a fresh start."
        )
    step, planned = saved.get("step", 0), saved.get("max_train_steps", args.max_train_steps)
    planned_rate = args.lr_scheduler != "constant" and not staged
    changing = [f"--lr_scheduler {args.lr_scheduler}"] * planned_rate + [*follows_length]
    if changing and planned != args.max_train_steps:
        accelerator.print(
            f"warning: {', '.join(changing)} was planned for {planned} steps and now ends at {args.max_train_steps}: "
            f"from step {step} on everything is that of the new length."
        )
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    stop = StopSignal(timeout if accelerator.num_processes > 1 else None, args.must_save_by)
    seed_all(args.seed)  # the initialisation of what is trained; nothing after it draws a global random number
    state = saved.get("state", {})
    phases = Phases(accelerator.device)
    opened = args, accelerator, folder, checkpoint, identity, math.prod(split), stop, step, state, phases, watch
    return Run(*opened, engine_of(accelerator), precision)


def on_main_process(accelerator, decide):
    """What `decide()` returns on the main process, on every process; a UserError of it is raised on every process."""
    outcome = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = decide()
        except UserError as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def check_shared(accelerator, folder, checkpoint):
    """CheckpointError on every process where one doesn't see the run's folder, made by the main one, or checkpoint."""
    if accelerator.num_processes == 1:
        return
    mark = broadcast_object_list([folder.absolute() / f".{secrets.token_hex(8)}.tmp"])[0]
    if accelerator.is_main_process:
        mark.touch()
    accelerator.wait_for_everyone()
    sees = mark.is_file() and (checkpoint is None or (Path(checkpoint) / checkpoints.STATE).is_file())
    blind = [rank for rank, seen in enumerate(gather_object([sees])) if not seen]
    if accelerator.is_main_process:
        mark.unlink()
    if blind:
        raise CheckpointError(
            f"--output_dir: process {blind[0]} does not see {checkpoint or folder} of process 0: "
            "all machines must share the folder."
        )


# The run


@dataclass
class Run:
    """One run of a training script. `state` is JSON that goes into every checkpoint and comes back on resume."""

    args: object
    accelerator: Accelerator
    folder: Path
    checkpoint: Path | None  # that the run resumes from
    identity: dict  # the arguments that a continuation must share
    global_batch_size: int
    stop: StopSignal
    step: int  # optimizer steps done
    state: dict
    phases: Phases
    watch: object = None  # common/memory.py's Watch: what memory it was expected to take, and takes
    engine: str = "ddp"  # or "fsdp2", "zero2"; see common/engines.py
    mixed_precision: str = "no"
    optimizers: dict = field(default_factory=dict)  # name to optimizer, as prepared
    skeletons: list = field(default_factory=list)  # (what an engine has, a copy of it without memory)
    trained: dict = field(default_factory=dict)  # name to {name: parameter}
    averages: dict = field(default_factory=dict)  # name to EMA
    norms: dict = field(default_factory=dict)  # name to the last gradient norm; see common/optimization.py
    skipped: dict = field(default_factory=dict)  # name to updates skipped (in all, in a row), long (2,), on the device
    terms: dict = field(default_factory=dict)  # what `add` was given since the last report
    logs: dict = field(default_factory=dict)  # the last report
    reported: int = 0  # the step of it
    bar: object = None
    profile: Profile | None = None
    tracked: bool = True  # until a tracker fails

    @property
    def device(self):
        return self.accelerator.device

    @property
    def dtype(self):
        """The compute dtype, of what is frozen."""
        return compute_dtype(self.mixed_precision)

    def register(self, trained, averages):
        """Say what checkpoints hold, load the one that the run resumes from, start trackers and bar.

        trained: {name: {name: parameter}}; averages: {name: EMA} of those that have one. Called again, where what is
        trained has become another model, it only says what checkpoints hold from here on.
        """
        for ours, theirs in ((self.trained, trained), (self.averages, averages)):  # the hooks know these two
            ours.clear()
            ours.update(theirs)
        if self.bar is not None:
            return
        register_checkpoint_hooks(self.accelerator, self.trained, self.averages)
        if self.checkpoint:
            alike = self.engine == "ddp" and (self.checkpoint / WHOLE_OPTIMIZER).is_file()
            read = self.accelerator.load_state if alike else partial(load_cut, self)
            checkpoints.load_checkpoint(self.accelerator, self.checkpoint, read)
            for name, ema in averages.items():
                ema.updates = self.state["averaged"][name]
        for name, counts in self.state.setdefault("skipped", {}).items():
            self.skipped[name] = torch.tensor(counts, device=self.device)
        self.reported = self.step
        if self.args.profile_steps and self.accelerator.is_main_process:
            self.profile = Profile(self.args.profile_steps, self.folder, self.phases.on_gpu)
        if self.accelerator.log_with:
            config = {
                name: value if isinstance(value, int | float) else str(value)
                for name, value in vars(self.args).items()
            }
            self.accelerator.init_trackers("logs", config)
        self.bar = tqdm(
            total=self.args.max_train_steps,
            initial=self.step,
            desc="steps",
            disable=not self.accelerator.is_local_main_process,
        )

    def batches(self, loader, updates=1):
        """The micro-batches of one optimizer step, of a loader that goes on from step to step.

        A signal ends the run here, or --must_save_by, between two of them, where the last complete step is saved; with
        several `updates` of one step only before the first is made.
        """
        for number in range(self.args.gradient_accumulation_steps * updates):
            if number < self.args.gradient_accumulation_steps:
                self._stop_if_told()
            if self.profile and number == 0:
                self.profile.before(self.step + 1)
            self.phases.mark("data")
            batch = next(loader)
            self.phases.mark("encode")
            yield batch

    def _stop_if_told(self):
        if not self.stop.requested():
            return
        self.accelerator.print(f"Stopping after step {self.step}.")
        if self.step:
            self.save(now=True)
        said = f"Stopped by {self.stop.why} after step {self.step}; --resume_from_checkpoint latest goes on."
        self.accelerator.print(said)
        if self.accelerator.is_main_process:
            with contextlib.suppress(OSError):  # a full disk: what counts is saved
                (self.folder / STOPPED_MARK).write_text(f"{said}\n")
        self._leave()
        raise Stopped

    def phase(self, name):
        """From here on the time goes to the "teacher", say; `batches` and `clip` mark what comes before and after."""
        self.phases.mark(name)

    def add(self, **terms):
        """Add scalars of a micro-batch to what `count` reports: means over micro-batches, processes and steps."""
        for name, value in terms.items():
            share = torch.as_tensor(value).detach().float() / self.args.gradient_accumulation_steps
            self.terms[name] = self.terms.get(name, 0) + share

    def count(self, shown=("loss", "grad_norm"), **more):
        """Count an optimizer step. Every --logging_steps, at the first and at the last, report what there is.

        That is: what was added since the last report, the last gradient norms, skipped updates, `more`, speed, seconds
        by phase and memory. Nothing else waits for the device. shown: names beside the bar. Raises UsageError, after a
        checkpoint, where too many updates in a row were skipped.
        """
        self.step += 1
        self.phases.mark(None)
        if self.watch:
            self.watch.note()
        self.bar.update()
        if self.profile and (written := self.profile.after(self.step)):
            self.accelerator.print(f"Profile: {written}")
        last = self.step in (1, self.args.max_train_steps)
        if not (last or self.step % self.args.logging_steps == 0):
            return
        steps = self.step - self.reported
        values = [torch.as_tensor(value, device=self.device).float() / steps for value in self.terms.values()]
        names, norms, skipped = list(self.terms), list(self.norms.values()), list(self.skipped.values())
        reduced = self.accelerator.reduce(torch.stack(values), reduction="mean")
        found = torch.cat([reduced, *(norm.view(1) for norm in norms), *(counts.float() for counts in skipped)])
        found = found.tolist()
        self.logs = dict(zip([*names, *self.norms], found))
        counts = [int(count) for count in found[len(names) + len(norms) :]]
        self.state["skipped"] = {name: counts[2 * i : 2 * i + 2] for i, name in enumerate(self.skipped)}
        self.logs["skipped"] = sum(counts[::2])
        speed = self._speed(steps)
        shown = {name: f"{self.logs[name]:.4g}" for name in shown}
        self.bar.set_postfix({**shown, "samples/s": f"{speed['samples_per_second']:.3g}"})
        self._log({**self.logs, **more, **speed})
        self.terms, self.reported = {}, self.step
        for name, (_, in_a_row) in self.state["skipped"].items():
            if in_a_row >= self.args.max_skipped_updates:
                self.save(now=True)
                raise UsageError(
                    f"{in_a_row} updates of the {name} in a row had no finite gradient, up to step "
                    f"{self.step}; checkpoint-{self.step} keeps what came before them. Start again in "
                    "another --run_name, with a lower learning rate or with bf16 instead of fp16; or, "
                    "where the data of these steps are broken, resume."
                )

    def _speed(self, steps):
        """{name: number} on the last so many steps: speed, seconds of a step by phase, memory, time left."""
        seconds = {f"seconds_{name}": taken / steps for name, taken in self.phases.read().items()}
        step = max(sum(seconds.values()), 1e-9)
        return {
            **seconds,
            "samples_per_second": self.global_batch_size / step,
            "seconds_left": step * (self.args.max_train_steps - self.step),
            "peak_memory_gb": peak_memory(self.device) / 1e9,
        }

    def validates(self):
        """Whether this step is one after which samples are drawn."""
        return bool(self.args.validation_prompts) and self.step % self.args.validation_steps == 0

    def save(self, now=False):
        """Write checkpoint-<step> where one is due: every --checkpointing_steps, after the last step, or `now`.

        Old ones make room only for one whose last update was taken. Raises UsageError rather than write weights that
        are not finite, or call a run done whose last loss was not.
        """
        last = self.step == self.args.max_train_steps
        if not (now or last or self.step % self.args.checkpointing_steps == 0):
            return
        for name, tensors in [*self.trained.items(), *((name, ema.shadow) for name, ema in self.averages.items())]:
            if not self._all_finite(tensors):
                raise UsageError(
                    f"the weights of the {name} are no longer finite at step {self.step}, which is not "
                    "saved; older checkpoints stay. Start from one of them, or again, with a lower "
                    "learning rate."
                )
        self.state["averaged"] = {name: ema.updates for name, ema in self.averages.items()}
        self.state["skipped"] = {name: counts.tolist() for name, counts in self.skipped.items()}
        healthy = all(in_a_row == 0 for _, in_a_row in self.state["skipped"].values())
        try:
            write = self.accelerator.save_state if self.engine == "ddp" else partial(save_cut, self)
            limit, began = self.args.checkpoints_total_limit if healthy else None, time.monotonic()
            checkpoints.save_checkpoint(self.accelerator, self.folder, self.step, write, self._described(), limit)
            self.stop.saved(time.monotonic() - began)
        except CheckpointError as error:
            if now or last:
                raise
            self.accelerator.print(f"warning: {error} The run goes on, and tries again when the next one is due.")
        if last:
            self.check_finite()

    def _all_finite(self, tensors):
        """Whether {name: tensor} are finite, on every process: the parts of others too."""
        finite = all(bool(local(tensor.detach()).isfinite().all()) for tensor in tensors.values())
        return finite if self.engine == "ddp" else all(gather_object([finite]))

    def _described(self):
        """{name: value} of what a checkpoint's STATE says of the run."""
        return {
            "max_train_steps": self.args.max_train_steps,
            "global_batch_size": self.global_batch_size,
            "split": [
                self.args.train_batch_size,
                self.accelerator.num_processes,
                self.args.gradient_accumulation_steps,
            ],
            "arguments": self.identity,
            "state": self.state,
        }

    def check_finite(self):
        """UsageError where the last loss was not finite: what is trained is then no output."""
        if not math.isfinite(self.logs.get("loss", 0.0)):
            raise UsageError(
                f"the loss of step {self.step} is not finite, so no output is written; checkpoints stay. "
                "Start again with a lower learning rate, or with bf16 instead of fp16."
            )

    def end(self, *said, done=True):
        """Close the bar and the trackers, once everything is written; done: a final/ was, and is named first.

        And uploaded, with --push_to_hub: raises UsageError, on every process, where that fails.
        """
        self.bar.close()
        self.accelerator.print(*[f"Done: {self.folder / 'final'}"] * done, *said)
        if self.watch and (measured := self.watch.said()):
            self.accelerator.print(measured)
        if done and self.args.push_to_hub:
            where = on_main_process(self.accelerator, lambda: upload(self.folder / "final", self.args.hub_model_id))
            self.accelerator.print(f"Uploaded: {where}")
        self._leave()

    def _leave(self):
        self.accelerator.wait_for_everyone()
        checkpoints.release_locks()
        with contextlib.suppress(Exception):  # a tracker that fails has nothing left to lose
            self.accelerator.end_training()

    def _log(self, values):
        """To the trackers; one that fails is said once, and the run goes on without it."""
        if self.tracked:
            try:
                self.accelerator.log(values, step=self.step)
            except Exception as error:  # whatever a tracker raises
                self.tracked = False
                print(f"warning: --report_to {self.args.report_to} failed ({first_line(error)}): no more is logged.")


def run_script(main, args):
    """Run main(args); a user's mistake becomes one sentence on stderr and exit status 2."""
    try:
        main(args)
    except UserError as error:
        said = str(error)
    except OSError as error:  # a disk that is full, a file that is gone
        if error.errno is None:
            raise
        said = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    except SafetensorError as error:  # the same, while weights are written
        if "I/O error" not in str(error):
            raise
        said = first_line(error)
    else:
        return
    finally:
        checkpoints.release_locks()
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" (process {rank})"  # broken images, say, may be only in its share
    print(f"error: {said}{where}", file=sys.stderr, flush=True)
    sys.exit(2)
