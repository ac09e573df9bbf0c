"""Where a run's time goes: seconds by phase, what memory it took at most, and a profiler's trace of some steps.

On a GPU a phase lasts from one event on its own clock to the next, and nothing waits for them until they are read.
"""

import sys
import time
from pathlib import Path

import torch

PHASES = ("data", "encode", "teacher", "student", "optimizer")  # of a step, in this order


class Phases:
    """Seconds by phase: a mark ends the phase before it. Read together, which is when a GPU is waited for."""

    def __init__(self, device):
        self.on_gpu, self.marks = device.type == "cuda", []

    def mark(self, name):
        """From here on it is phase `name`; None: none of them."""
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        else:
            event = time.perf_counter()
        self.marks.append((name, event))

    def read(self):
        """{name: seconds} of every phase since the last read; the one that goes on counts up to now."""
        self.mark(self.marks[-1][0] if self.marks else None)
        if self.on_gpu:
            self.marks[-1][1].synchronize()
        seconds = dict.fromkeys(PHASES, 0.0)
        for (name, began), (_, ended) in zip(self.marks, self.marks[1:]):
            if name is not None:
                seconds[name] += began.elapsed_time(ended) / 1000 if self.on_gpu else ended - began
        self.marks = self.marks[-1:]
        return seconds


def peak_memory(device):
    """Bytes that this process took at most: of a GPU, of its tensors; of a CPU, resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class Profile:
    """--profile_steps: torch's profiler over optimizer steps first to last, written for chrome://tracing."""

    def __init__(self, steps, folder, on_gpu):
        self.first, self.last = steps
        self.file = Path(folder) / f"profile-{self.first}-{self.last}.json"
        activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
        self.profiler = torch.profiler.profile(activities=activities, record_shapes=True)
        self.running = False

    def before(self, step):
        """Before optimizer step `step`, counted from 1."""
        if step == self.first:
            self.profiler.start()
            self.running = True

    def after(self, step):
        """After it: the trace's file where this was the last one, else None."""
        if not self.running or step < self.last:
            return None
        self.profiler.stop()
        self.running = False
        self.profiler.export_chrome_trace(str(self.file))
        return self.file
