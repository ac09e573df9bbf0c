"""Run a training script and note how long its optimizer steps take: the process that benchmarks/training.py starts.

    python benchmarks/timed_steps.py --notes notes.json --steps 20 --warmup 5 train_lcm.py --max_steps 20

Nothing of the script is changed, and nothing of this repository is imported: any script whose optimizer goes through
accelerator.prepare will do. Of several optimizers the one that was prepared first counts (the student's, not a
discriminator's); one that is prepared after the first step, as for another stage, takes over. A step lasts from the
end of one update to the end of the next: data, logging and averages are in it, start-up and what is saved at the end
are not. The process is ended after its last step, so that its peak memory is that of training.
"""

import argparse
import json
import os
import resource
import runpy
import sys
import time
from pathlib import Path

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch.utils.flop_counter import FlopCounterMode


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--notes", required=True, help="JSON file to write")
    add("--steps", type=int, required=True, help="optimizer steps in all")
    add("--warmup", type=int, required=True, help="of them, the first so many don't count")
    add("--threads", type=int, help="of the CPU (default: torch's)")
    add("--cpu_time", action="store_true", help="this process's seconds in place of the clock's")
    add("--flops", action="store_true", help="count the floating-point operations of one more step")
    add("--no_autocast", action="store_true", help="torch.autocast does nothing: all in the dtype of the weights")
    add(
        "--cut_prompts", action="store_true", help="no tokenizer goes beyond its model_max_length, whatever it is told"
    )
    add("script", help="and its flags")
    add("flags", nargs=argparse.REMAINDER)
    return parser.parse_args(argv)


def peak_resident():
    """Peak resident bytes of this process.

    By Linux's VmHWM, which starts with the program: ru_maxrss starts from the process that this one was forked from.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def seconds_per_step(ends, warmup):
    """Mean seconds of the steps after the first `warmup`, from the seconds at which each step ended.

    The mean, so that what comes with only some steps, such as logging, is in it by its share.
    """
    return (ends[-1] - ends[warmup - 1]) / (len(ends) - warmup)


class Noted:
    """Notes the ends of the steps of the optimizer that counts, and ends the process after the last."""

    def __init__(self, args):
        self.args, self.ends, self.optimizer, self.stepped = args, [], None, False
        self.now = time.process_time if args.cpu_time else time.perf_counter
        self.counter = None  # of the operations of the step after the last

    def prepared(self, optimizer):
        if self.optimizer is None or self.stepped:
            self.optimizer, self.stepped = optimizer, False

    def end_of_step(self, optimizer):
        if optimizer is not self.optimizer or not optimizer.gradient_state.sync_gradients:
            return
        if self.counter is not None:
            self.counter.__exit__(None, None, None)
            self.write(optimizer, self.counter.get_total_flops())
            raise SystemExit(0)
        self.stepped, done = True, len(self.ends) + 1
        # Nowhere else: waiting for the GPU after each step would take from a script the time that it runs ahead.
        if torch.cuda.is_available() and done in (self.args.warmup, self.args.steps):
            torch.cuda.synchronize()
        self.ends.append(self.now())
        if done < self.args.steps:
            return
        self.write(optimizer)
        if not self.args.flops:
            raise SystemExit(0)
        self.counter = FlopCounterMode(display=False).__enter__()

    def write(self, optimizer, flops=None):
        cuda = torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0
        notes = {
            "seconds_per_step": seconds_per_step(self.ends, self.args.warmup),
            "ends": self.ends,
            "accumulation": optimizer.gradient_state.num_steps,
            "peak_resident_bytes": peak_resident(),
            "peak_gpu_bytes": torch.cuda.max_memory_allocated() if cuda else None,
            "peak_gpu_reserved_bytes": torch.cuda.max_memory_reserved() if cuda else None,
            "flops": flops,
        }
        Path(self.args.notes).write_text(json.dumps(notes))


def watch(noted):
    """Every accelerated optimizer of this process tells `noted` of itself and of its steps."""
    init, step = AcceleratedOptimizer.__init__, AcceleratedOptimizer.step

    def noted_init(self, *args, **kwargs):
        init(self, *args, **kwargs)
        noted.prepared(self)

    def noted_step(self, *args, **kwargs):
        step(self, *args, **kwargs)
        noted.end_of_step(self)

    AcceleratedOptimizer.__init__, AcceleratedOptimizer.step = noted_init, noted_step


def no_autocast():
    """torch.autocast does nothing from here on."""

    class Off(torch.autocast):
        def __init__(self, device_type, dtype=None, enabled=True, cache_enabled=None):
            super().__init__(device_type, dtype=dtype, enabled=False, cache_enabled=cache_enabled)

    torch.autocast = Off


def cut_prompts():
    """Tokenizers go to model_max_length at most: a script that says max_length=77 runs on shorter text encoders."""
    from transformers import PreTrainedTokenizerBase

    tokenize = PreTrainedTokenizerBase.__call__

    def cut(self, *args, max_length=None, **kwargs):
        limit = self.model_max_length
        return tokenize(self, *args, max_length=limit if max_length is None else min(max_length, limit), **kwargs)

    PreTrainedTokenizerBase.__call__ = cut


def main(args):
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.no_autocast:
        no_autocast()
    if args.cut_prompts:
        cut_prompts()
    noted = Noted(args)
    watch(noted)
    sys.argv = [args.script, *args.flags]
    sys.path[0] = os.path.dirname(os.path.abspath(args.script))  # as python itself would have it
    runpy.run_path(args.script, run_name="__main__")
    sys.exit(f"{args.script} made {len(noted.ends)} of {args.steps} optimizer steps through accelerate")


if __name__ == "__main__":
    main(parse_args())
