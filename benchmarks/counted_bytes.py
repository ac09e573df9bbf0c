"""Run a training script and note what this process sends to others in each optimizer step: communication.py starts it.

    accelerate launch --num_processes 2 benchmarks/counted_bytes.py --notes notes.json --steps 4 train_lcm.py ...

Two counts, which know nothing of each other: of the kernel, how many bytes went out through this process's TCP
sockets, by which gloo sends all that it sends; and of torch's profiler, which collectives ran, on how many elements.
Nothing of the script is changed. A step lasts from the end of one count of steps to the end of the next.
"""

import argparse
import json
import os
import runpy
import socket
import struct
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from common.run import Run  # noqa: E402

BYTES_SENT = 200  # where tcpi_bytes_sent is in Linux's struct tcp_info, and behind it those that were sent again
BACKENDS = ("gloo:", "nccl:")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--notes", required=True, help="JSON file that process 0 writes")
    add("--steps", type=int, required=True, help="optimizer steps, after which the process is ended")
    add("script", help="and its flags")
    add("flags", nargs=argparse.REMAINDER)
    return parser.parse_args(argv)


def bytes_sent():
    """Bytes that went out through the TCP sockets that this process has open, so far; each once."""
    total = 0
    for number in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(number))) as opened:
                if opened.family in (socket.AF_INET, socket.AF_INET6) and opened.type == socket.SOCK_STREAM:
                    info = opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, BYTES_SENT + 16)
                    sent, again = struct.unpack_from("QQ", info, BYTES_SENT)
                    total += sent - again
        except OSError:  # closed meanwhile, or none that is connected
            continue
    return total


def collectives(profiler):
    """[[name, shape of the first tensor, how often]] of the collectives that a profiler saw, the largest first."""
    found = Counter()
    for event in profiler.events():
        if event.name.startswith(BACKENDS):
            found[event.name.partition(":")[2], tuple((event.input_shapes or [()])[0])] += 1
    rows = [[name, list(shape), count] for (name, shape), count in found.items()]
    return sorted(rows, key=lambda row: -torch.Size(row[1]).numel())


class Counted:
    """Notes what every step sent, and ends the process after the last."""

    def __init__(self, args):
        self.args, self.notes, self.profiler, self.before = args, [], None, 0

    def end_of_step(self, run):
        if self.profiler is not None:
            self.profiler.stop()
            time.sleep(0.3)  # what gloo's threads still send of this step
            sent = bytes_sent() - self.before
            said = {"step": run.step, "sent": sent, "collectives": collectives(self.profiler)}
            self.notes.append(said | {"reports": run.reported == run.step})
        if run.step == self.args.steps:
            trained = {id(p): p.numel() for part in run.trained.values() for p in part.values() if p.requires_grad}
            notes = {"processes": run.accelerator.num_processes, "engine": run.engine, "steps": self.notes}
            notes |= {"precision": run.mixed_precision, "trained": sum(trained.values())}
            if run.accelerator.is_main_process:
                Path(self.args.notes).write_text(json.dumps(notes))
            raise SystemExit(0)
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True)
        self.profiler.start()
        self.before = bytes_sent()


def main(args):
    counted, count = Counted(args), Run.count

    def noted(run, *given, **more):
        count(run, *given, **more)
        counted.end_of_step(run)

    Run.count = noted
    sys.argv = [args.script, *args.flags]
    sys.path[0] = os.path.dirname(os.path.abspath(args.script))  # as python itself would have it
    runpy.run_path(args.script, run_name="__main__")


if __name__ == "__main__":
    main(parse_args())
