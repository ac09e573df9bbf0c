"""How far the losses of two processes, under each engine, are from those of one with the same global batch.

    python benchmarks/processes.py train_student_kd.py --steps 20

Launches the script on the embedded default, as a user would: once in one process, and then in two for every
configuration of --configs. Prints the largest relative difference of the loss of a step.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", help="training script of this repository; flags that it doesn't know here go to it")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=8, help="global")
    parser.add_argument("--configs", nargs="+", default=["cpu", "fsdp2", "deepspeed_zero2"])
    return parser.parse_known_args(argv)


def losses(folder):
    """[loss of every step] that a run has logged for tensorboard."""
    logs = next(folder.rglob("logs"))
    events = EventAccumulator(str(logs))
    events.Reload()
    return [event.value for event in events.Scalars("loss")]


def run(args, more, processes, launcher):
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "--num_processes", str(processes)]
        line += ["--mixed_precision", "no", str(ROOT / args.script), "--max_steps", str(args.steps)]
        line += ["--train_batch_size", str(args.batch_size // processes), "--logging_steps", "1", *more]
        result = subprocess.run([*line, "--output_dir", folder], text=True, capture_output=True)
        if result.returncode:
            sys.exit(f"{result.stdout[-2000:]}\n{result.stderr[-2000:]}")
        return losses(Path(folder))


def main(args, more):
    alone = run(args, more, 1, ["--num_machines", "1", "--dynamo_backend", "no", "--cpu"])
    for config in args.configs:
        both = run(args, more, 2, ["--config_file", str(ROOT / f"accelerate_configs/{config}.yaml")])
        worst = max(abs(a - b) / abs(a) for a, b in zip(alone, both, strict=True))
        print(f"{args.script}, {args.steps} steps, 2 processes by {config}.yaml: {worst:.1e}", flush=True)


if __name__ == "__main__":
    main(*parse_args())
