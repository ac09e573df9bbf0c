"""How far the losses of two processes, under each engine, are from those of one with the same global batch.

    python benchmarks/processes.py train_student_kd.py --steps 20

Launches the script on the embedded default, as a user would: in two processes for every configuration of --configs,
and in one, which accumulates the same two micro-batches, or takes both at once. Prints the largest relative difference
of the loss of a step, from either. The second has in it what the CPU's kernels round otherwise in a larger batch.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
ALONE = ["--num_machines", "1", "--dynamo_backend", "no", "--cpu", "--num_processes", "1"]


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


def run(args, more, launcher, micro_batch, accumulated=1):
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "--mixed_precision", "no"]
        line += [str(ROOT / args.script), "--max_steps", str(args.steps), "--logging_steps", "1", *more]
        line += ["--train_batch_size", str(micro_batch), "--gradient_accumulation_steps", str(accumulated)]
        result = subprocess.run([*line, "--output_dir", folder], text=True, capture_output=True)
        if result.returncode:
            sys.exit(f"{result.stdout[-2000:]}\n{result.stderr[-2000:]}")
        return losses(Path(folder))


def worst(found, reference):
    return max(abs(a - b) / abs(b) for a, b in zip(found, reference, strict=True))


def main(args, more):
    half = args.batch_size // 2
    accumulated, at_once = run(args, more, ALONE, half, 2), run(args, more, ALONE, args.batch_size)
    said = f"{args.script}, {args.steps} steps"
    print(f"{said}, 1 process at once: {worst(at_once, accumulated):.1e} from accumulated", flush=True)
    for config in args.configs:
        launcher = ["--config_file", str(ROOT / f"accelerate_configs/{config}.yaml"), "--num_processes", "2"]
        both = run(args, more, launcher, half)
        from_one = f"{worst(both, accumulated):.1e} from accumulated, {worst(both, at_once):.1e} from at once"
        print(f"{said}, 2 processes by {config}.yaml: {from_one}", flush=True)


if __name__ == "__main__":
    main(*parse_args())
