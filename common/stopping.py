"""Ends before the end: by a signal, by a launcher that has died, or by --must_save_by; saved, and to be resumed."""

import os
import signal
import time

import torch

STOPPED = 75  # exit status of a run that was stopped and can be resumed (sysexits' EX_TEMPFAIL: try again)
STOPPED_MARK = "stopped"  # a file that says so in the run's folder: `accelerate launch` makes of every status a 1
SHARE, MOST = 0.1, 60  # left for a checkpoint of unknown length: a share of the time, of at most so many seconds


class StopSignal:
    """Notes SIGTERM and SIGINT so that a run can save before it ends; a second SIGINT interrupts at once.

    A run whose launcher has died is told so too: `accelerate launch` passes no signal on before it ends. minutes: of
    --must_save_by, or None.
    """

    def __init__(self, timeout=None, minutes=None):
        self.received, self.why, self._group, self._time = None, None, None, None if minutes is None else Time(minutes)
        launched = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
        self._launcher = os.getppid() if launched else None
        if timeout is not None:  # processes agree over the CPU, so that no one waits for a GPU
            self._group = torch.distributed.new_group(backend="gloo", timeout=timeout)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number, frame):
        if self.received == signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def requested(self):
        """Whether ANY process is to stop, and `why`: all get the same answer, so that they save the same step.

        To be asked between any two steps.
        """
        orphaned = self._launcher is not None and os.getppid() != self._launcher
        told, late = orphaned or self.received is not None, self._time is not None and self._time.is_short()
        flags = torch.tensor([int(told), int(late)])
        if self._group is not None:
            torch.distributed.all_reduce(flags, group=self._group)
        told, late = flags.tolist()
        self.why = "a signal" if told else "--must_save_by" if late else None
        return bool(told or late)

    def saved(self, seconds):
        """Note how long a checkpoint took."""
        if self._time is not None:
            self._time.save = max(self._time.save or 0, seconds)


class Time:
    """How much is left of so many minutes after the process began, and how much a step and a checkpoint take."""

    def __init__(self, minutes):
        self.end, self.save, self.step, self._asked = 60 * minutes, None, 0.0, None

    def is_short(self):
        """Whether another step like the longest so far, and twice the longest checkpoint, would not fit any more."""
        now = age()
        if self._asked is not None:
            self.step = max(self.step, now - self._asked)
        self._asked = now
        save = min(SHARE * self.end, MOST) if self.save is None else 2 * self.save
        return now + self.step + save >= self.end


def age():
    """Seconds since this process began; where the system doesn't say, since this module was imported."""
    try:
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])  # since the machine's start
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return time.monotonic() - _IMPORTED


_IMPORTED = time.monotonic()


class Stopped(SystemExit):
    """Ends a run that was stopped, after its last complete step was saved: exit status STOPPED."""

    def __init__(self):
        super().__init__(STOPPED)
