"""What training sends between processes in a step: measured with 2 CPU processes, and on paper for many GPUs.

    python benchmarks/communication.py --script train_lcm.py -- --lora_rank 64
    python benchmarks/communication.py --script train_lcm.py --architecture sd15 -- --lora_rank 64
    python benchmarks/communication.py --script train_guided.py --config_file accelerate_configs/fsdp2.yaml
    python benchmarks/communication.py --paper
    python benchmarks/communication.py --paper --gpu_tflops 989 --node_gigabytes 450 --batch_size 16

Measured are the bytes that leave process 0 by its sockets, as the kernel counts them, against those of the gradients
of what is trained; and which collectives they were, as torch's profiler has them. Shown is the third step, which only
trains, and what the fourth, which also reports, sends beside it.

--paper: seconds of a step are its floating-point operations, counted, over the share of the GPU's peak that is
reached; those of communication are its bytes over the slowest link of the ring. With N processes each sends
(N - 1) / N of what is gathered or scattered, and twice that of what is reduced for all. Efficiency is what remains of
a lone GPU's speed: at worst, where all that is sent is waited for, and at best, where it is sent during the backward
pass (FSDP2: forward and backward), but for what does not fit in. Latencies are left out.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from benchmarks import memory_table  # noqa: E402
from benchmarks.shared import circumstances, sd15_folder  # noqa: E402
from common import arguments, trial  # noqa: E402
from common.conditioning import encode_images, predict  # noqa: E402
from common.contract import TINY_SD  # noqa: E402
from common.errors import UsageError, UserError  # noqa: E402
from common.run import run_script  # noqa: E402

STEPS = 4
PAPER = (  # model, what is trained, flags of train_lcm.py, engines
    ("sd15", "LoRA of rank 64", ["--lora_rank", "64"], ("ddp",)),
    ("sd15", "whole UNet", [], ("ddp", "fsdp2")),
    ("sdxl", "LoRA of rank 64", ["--lora_rank", "64"], ("ddp",)),
    ("sdxl", "whole UNet", [], ("ddp", "fsdp2")),
)
HALF, FULL = 2, 4  # bytes of a number in bf16 and in fp32


def parse_args(argv=None):
    parser = arguments.make_parser(__doc__)
    add = parser.add_argument_group("measured").add_argument
    add("--script", help="training script, such as train_lcm.py")
    add("--config_file", default=str(ROOT / "accelerate_configs/cpu.yaml"), help="of accelerate launch: the engine")
    add("--processes", type=arguments.positive_int, default=2, help="on this machine")
    add("--architecture", choices=("sd15",), help="random weights of this size (default: tiny-sd)")
    add("--resolution", type=arguments.positive_int, default=64, help="pixels per side")
    add("--batch_size", type=arguments.positive_int, help="samples of each process (default: 1; with --paper 4)")
    add("--work_dir", default="outputs/full_size", help="where sd15 is written")
    add("rest", nargs="*", help="flags of the script, after --")
    add = parser.add_argument_group("on paper").add_argument
    add("--paper", action="store_true", help="compute step and communication of train_lcm.py instead, in bf16")
    add("--gpus", type=int, nargs="+", default=[8, 64], help="how many in all, eight to a node")
    add("--gpu_tflops", type=arguments.positive_float, default=312, help="peak in bf16, dense (312: A100, 989: H100)")
    add("--gpu_share", type=arguments.positive_float, default=0.4, help="of the peak that a step reaches")
    add("--node_gigabytes", type=arguments.positive_float, default=300, help="GB/s of a GPU's NVLink, one way")
    add("--network_gigabits", type=float, nargs="+", default=[100, 400], help="Gbit/s of a node's network, one way")
    add("--link_share", type=arguments.positive_float, default=0.8, help="of a link's rate that is reached")
    add("--output", help="JSON file of what is printed")
    return parser.parse_args(argv)


# Measured


def measure(args):
    """Launch the script under counted_bytes.py; returns its notes, with the bytes of the gradients."""
    model = sd15_folder(args.work_dir) if args.architecture else TINY_SD
    script = Path(args.script) if Path(args.script).is_file() else ROOT / args.script
    if not script.is_file():
        raise UsageError(f"--script {args.script}: there is no such file.")
    if not Path(args.config_file).is_file():
        raise UsageError(f"--config_file {args.config_file}: there is no such file.")
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "notes.json"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", args.config_file]
        command += ["--num_processes", str(args.processes), str(ROOT / "benchmarks/counted_bytes.py")]
        command += ["--notes", str(notes), "--steps", str(STEPS), str(script)]
        command += ["--pretrained_model_name_or_path", str(model), "--dataset_name", "shapes"]
        command += ["--resolution", str(args.resolution), "--batch_size", str(args.batch_size or 1)]
        command += ["--max_steps", str(STEPS + 2), "--logging_steps", str(STEPS), "--report_to", "none"]
        command += ["--output_dir", str(Path(folder) / "run"), *args.rest]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, text=True, capture_output=True)
        if not notes.is_file():
            raise UserError(f"{script.name} ended with {done.returncode}:\n{(done.stderr or done.stdout)[-2000:]}")
        found = json.loads(notes.read_text())
    return {**found, "gradient_bytes": FULL * found["trained"]}


def show(args, found):
    """Print what was measured."""
    _, quiet, reports = found["steps"]
    gradients, sent = found["gradient_bytes"], quiet["sent"]
    words = [args.script, *args.rest, f"on {args.architecture or 'tiny-sd'}"]
    print(f"{' '.join(words)}, {found['engine']}, {found['precision']}, {found['processes']} processes")
    print(f"trained: {found['trained']:,} parameters, {gradients:,} bytes of gradients in fp32")
    print(f"a step sends {sent:,} bytes, {sent / gradients:.4f} times that, and its report {reports['sent'] - sent:,}")
    for name, shape, count in quiet["collectives"]:
        print(f"  {count} x {name} of {torch.Size(shape).numel():,}")
    known = {(name, *shape): count for name, shape, count in quiet["collectives"]}
    for name, shape, count in reports["collectives"]:
        if more := count - known.get((name, *shape), 0):
            print(f"  its report: {more} x {name} of {torch.Size(shape).numel():,}")


# On paper


def bytes_sent(engine, processes, trained, target=0):
    """Bytes that each of so many processes sends in a step in bf16: of so many trained parameters.

    DDP reduces gradients in fp32. FSDP2 gathers weights in bf16 for the forward and again for the backward, and
    scatters the reduced gradients in fp32; target: parameters of a slow copy, gathered once. ZeRO-2 scatters the
    reduced gradients and gathers the updated weights, both in fp32.
    """
    once = {
        "ddp": 2 * FULL * trained,
        "fsdp2": (2 * HALF + FULL) * trained + HALF * target,
        "zero2": 2 * FULL * trained,
    }
    return once[engine] * (processes - 1) / processes


def rate(args, gigabits=None):
    """Bytes per second of the slowest link of a ring within a node, or over a network of so many Gbit/s."""
    node = 1e9 * args.node_gigabytes
    return args.link_share * (node if gigabits is None else min(node, 1e9 * gigabits / 8))


def efficiency(seconds, communication, hides):
    """(at worst, at best) share of a lone GPU's speed; hides: seconds of the step that communication may lie under."""
    return seconds / (seconds + communication), seconds / (seconds + max(0, communication - hides))


@torch.no_grad()
def operations(networks, args):
    """({pass: floating-point operations} of a step of train_lcm.py, trained parameters)."""
    count, trained = args.train_batch_size, [p.numel() for p in networks.trained.parameters() if p.requires_grad]

    def counted(function, *given):
        with FlopCounterMode(display=False) as counter:
            function(*given)
        return counter.get_total_flops()

    pixels = trial.blank(count, 3, args.resolution, args.resolution)
    text = trial.conditioning_of(networks.teacher, count, networks.tokens)
    forward = counted(predict, networks.teacher, *trial.noisy(networks, count), text)
    # The backward of all weights takes twice the forward; beside frozen ones it takes one, of the inputs.
    found = {"encode": counted(encode_images, networks.pipeline["vae"], pixels), "teacher": 2 * forward}
    found |= {"target": forward, "forward": forward, "backward": (2 if args.lora_rank is None else 1) * forward}
    return found, sum(trained)


def on_paper(args):
    """[row] of every entry of PAPER, number of GPUs and network."""
    rows = []
    for model, what, flags, engines in PAPER:
        kind, resolution = memory_table.MODELS[model]
        with tempfile.TemporaryDirectory() as folder:
            memory_table.write_model(kind, Path(folder))
            line = ["--pretrained_model_name_or_path", folder, "--resolution", str(resolution), *flags]
            line += ["--dataset_name", "shapes", "--batch_size", str(args.batch_size or 4), "--report_to", "none"]
            asked, _, _, method = memory_table.asked_by("train_lcm.py", [*line, "--mixed_precision", "bf16"])
            networks = trial.make_networks(asked, torch.bfloat16, **method)
            passes, trained = operations(networks, asked)
        speed = 1e12 * args.gpu_tflops * args.gpu_share
        seconds = sum(passes.values()) / speed
        for engine in engines:
            hidden = ("backward", "forward") if engine == "fsdp2" else ("backward",)
            hides = sum(passes[name] for name in hidden) / speed
            for processes in args.gpus:
                for gigabits in args.network_gigabits if processes > 8 else [None]:
                    sent = bytes_sent(engine, processes, trained, trained if engine == "fsdp2" else 0)
                    communication = sent / rate(args, gigabits)
                    worst, best = efficiency(seconds, communication, hides)
                    row = {"model": model, "trained": what, "parameters": trained, "engine": engine, "gpus": processes}
                    row |= {"gigabits": gigabits, "tflop": sum(passes.values()) / 1e12, "seconds": seconds}
                    row |= {"backward_share": hides / seconds, "bytes": sent, "communication": communication}
                    rows.append(row | {"worst": worst, "best": best})
    return rows


def show_paper(rows):
    """Print them as a table."""
    head = ["`train_lcm.py`", "", "GPUs", "s a step", "GB sent", "over", "s of that", "efficiency"]
    lines = []
    for row in rows:
        what = f"{memory_table.TITLES[row['model']]}, {row['trained']}"
        over = "NVLink" if row["gigabits"] is None else f"{row['gigabits']:g} Gbit/s"
        line = [what, {"ddp": "DDP", "fsdp2": "FSDP2"}[row["engine"]], str(row["gpus"]), f"{row['seconds']:.2f}"]
        line += [f"{row['bytes'] / 1e9:.3g}", over, f"{row['communication']:.2g}"]
        lines.append([*line, f"{row['worst']:.0%} to {row['best']:.0%}"])
    print(memory_table.table(head, lines))


def main(args):
    if args.paper:
        found = on_paper(args)
        show_paper(found)
    elif args.script:
        found = measure(args)
        show(args, found)
    else:
        raise UsageError("say which --script is to be measured, or --paper.")
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        report = {**circumstances("cpu"), "flags": vars(args), "found": found}
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run_script(main, parse_args())
