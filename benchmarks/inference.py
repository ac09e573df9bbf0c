"""Time of smaller models against that of their original, taken in turns: what fewer multiply-accumulates come to.

    python benchmarks/inference.py --models assets/tiny-sd outputs/pruned/final outputs/pruned/final-int8
    python benchmarks/inference.py --models assets/tiny-sd --steps 1 2 4 8 25 --dtype fp32 bf16 --torch_compile
    python benchmarks/inference.py --architecture sd15 --ratio 0.3 0.5

--models: whole pipelines, sampled without guidance, decode included. --architecture: passes of the UNet alone, with
random weights, as it is and with that share of the insides of its resnets and feed-forwards gone. Of several --steps
or --dtype, and of --torch_compile, every combination is one more: keep them few, they are all in memory at once.

After a warm-up everything runs once in each round, a-b-c-a-b-c, and each is divided by the first of the same round:
what slows a whole round, a neighbour on the machine, say, falls out. Printed are MACs (torch's counter) and times,
both also as ratios to the first: the median over the rounds, in brackets the quartiles, then the extremes. On a
machine with more work than cores --cpu_time leaves out the waiting for one, though not what its neighbours slow.
Models with INT8 weights keep the dtype that the rest of them was saved in, bfloat16, whatever --dtype says.
Compiling falls into the warm-up. Beside --output's file there is a picture: of pipelines the time per image against
the steps, of an architecture the time of a pass.
"""

import itertools
import json
import resource
import statistics
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import UNet2DConditionModel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402

from benchmarks.shared import bars, circumstances, spread  # noqa: E402
from common import arguments  # noqa: E402
from common.compression import channels  # noqa: E402
from common.compression.quantized_folders import quantization_of  # noqa: E402
from common.errors import UsageError  # noqa: E402
from common.judging import results  # noqa: E402
from common.pipelines import keep_vae_right, load_pipeline, read_pipeline_config  # noqa: E402
from common.run import run_script  # noqa: E402
from common.sampling import sample_timed  # noqa: E402

ARCHITECTURES = {"sd15": {"sample_size": 64, "cross_attention_dim": 768}}  # else as a UNet is by default
TOKENS = 77  # of a text, for an architecture
FACTOR = 8  # pixels to latents, for an architecture
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TABLE = (  # heading, column, how its value is written
    ("as", "dtype", str),
    ("parameters", "parameters", "{:,}".format),
    ("MACs", "macs", lambda macs: f"{macs / 1e9:.4g} G"),
    ("ratio of MACs", "macs_ratio", "{:.3f}".format),
    ("ms", "seconds_median", lambda seconds: f"{1000 * seconds:.1f}"),
    ("ratio of time", "time_ratio", "{:.3f}".format),
    ("from", "time_ratio_min", "{:.3f}".format),
    ("to", "time_ratio_max", "{:.3f}".format),
)


def parse_args(argv=None):
    parser = arguments.make_parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--models", nargs="+", help="pipelines (folders or hub ids), the original first")
    what.add_argument("--architecture", choices=tuple(ARCHITECTURES), help="a UNet with random weights instead")
    add = parser.add_argument
    add("--ratio", nargs="+", type=arguments.fraction, help="--architecture: shares that go (default: 0.3)")
    add("--resolution", type=arguments.positive_int, help="side in pixels (default: the first's; 256 of a UNet)")
    add("--batch_size", type=arguments.positive_int, default=1, help="images at once")
    add("--steps", type=arguments.positive_int, nargs="+", help="--models: sampling steps (default: 10)")
    add("--rounds", type=arguments.positive_int, default=20, help="how often each runs")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    add("--dtype", choices=("auto", *DTYPES), nargs="+", default=["auto"], help="auto: fp16 on CUDA, else fp32")
    add("--torch_compile", action="store_true", help="each of them with its UNet compiled, too")
    add("--threads", type=arguments.positive_int, help="of the CPU (default: torch's)")
    add("--cpu_time", action="store_true", help="take this process's seconds instead of the clock's: see above")
    add("--output", help="JSON file of all that was measured, with a picture beside it")
    return parser.parse_args(argv)


def check_arguments(args):
    """Refuse, before anything is loaded, what can't work; fill in what was left open. Raises UserError."""
    if args.models and args.ratio:
        raise UsageError("--ratio is about --architecture: --models are compared as they are.")
    if args.architecture and args.steps:
        raise UsageError("--steps is about --models: of an --architecture single passes are timed.")
    if args.output and not Path(args.output).absolute().parent.is_dir():
        raise UsageError(f"--output {args.output}: there is no folder to write it into.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no GPU here.")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    auto = "fp16" if args.device == "cuda" else "fp32"
    args.dtype = list(dict.fromkeys(auto if dtype == "auto" else dtype for dtype in args.dtype))
    if "fp16" in args.dtype and args.device == "cpu":
        raise UsageError("--dtype fp16 needs a GPU: use fp32 or bf16.")
    found = [read_pipeline_config(path, flag="--models", quantized=True) for path in args.models or ()]
    args.resolution = args.resolution or (found[0][1] if found else 256)
    for factor in [factor for _, _, factor in found] or [FACTOR]:
        if args.resolution % factor:
            raise UsageError(f"--resolution {args.resolution} is not a multiple of {factor}, the VAE's factor.")
    if args.cpu_time and (args.device != "cpu" or args.threads != 1):
        raise UsageError("--cpu_time needs --device cpu and --threads 1: several threads' seconds would add up.")
    args.ratio, args.steps = args.ratio or [0.3], list(dict.fromkeys(args.steps or [10]))


def build_unet(architecture, ratio, dtype, device):
    """A UNet with random weights, `ratio` of the insides of its resnets and feed-forwards gone, frozen.

    Pruned before it has weights, so that no two copies are in memory; which channels go makes no difference to time.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel(**ARCHITECTURES[architecture])
    kept = {
        group.name: range(channels.units_kept(group, ratio))
        for group in channels.groups_of(unet)
        if group.kind in ("conv", "feed_forward")
    }
    channels.prune(unet, kept)
    unet = torch.nn.Module.to(unet, dtype).to_empty(device=device)
    for parameter in unet.parameters():
        parameter.data.normal_(std=0.02)
    return unet.eval().requires_grad_(False)


def unet_calls(args):
    """[(columns, call, plain call)] of the architecture's UNet, as it is and pruned at each of --ratio.

    The plain call is the same one where nothing is compiled: what is counted.
    """
    side, found = args.resolution // FACTOR, []
    for ratio, dtype in itertools.product((0.0, *args.ratio), args.dtype):
        options, plain = {"device": args.device, "dtype": DTYPES[dtype]}, None
        for compiled in (False, True)[: 1 + args.torch_compile]:
            unet = build_unet(args.architecture, ratio, DTYPES[dtype], args.device)
            if compiled:
                unet.compile()
            z = torch.randn(args.batch_size, unet.config.in_channels, side, side, **options)
            text = torch.randn(args.batch_size, TOKENS, unet.config.cross_attention_dim, **options)
            name = f"{args.architecture}, {ratio:g} gone" if ratio else args.architecture
            columns = {"model": name, "dtype": dtype, "compiled": compiled, "parameters": channels.count(unet)}

            def call(unet=unet, z=z, text=text):
                return unet(z, 500, text)

            plain = plain or call
            found.append((columns, call, plain))
    return found


def pipeline_calls(args):
    """[(columns, call, plain call)] of the pipelines of --models, each making --batch_size images; see unet_calls."""
    found = []
    for path in args.models:
        kept = quantization_of(path)  # such weights are of one dtype
        for dtype in args.dtype[:1] if kept else args.dtype:
            plain = {}
            for compiled in (False, True)[: 1 + args.torch_compile]:
                pipeline = load_pipeline(path, DTYPES[dtype], flag="--models")
                keep_vae_right(pipeline)
                pipeline.to(args.device)
                if compiled:
                    pipeline.unet.compile()
                modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
                columns = {
                    "model": path,
                    "dtype": kept or dtype,
                    "compiled": compiled,
                    "parameters": sum(channels.count(module) for module in modules),
                }
                for steps in args.steps:
                    call = partial(
                        sample_timed,
                        pipeline,
                        args.device,
                        prompt=["a photo"] * args.batch_size,
                        num_inference_steps=steps,
                        guidance_scale=1.0,
                        height=args.resolution,
                        width=args.resolution,
                    )
                    plain.setdefault(steps, call)
                    found.append(({**columns, "steps": steps}, call, plain[steps]))
    return found


def named(args, columns):
    """The columns with their "configuration": the model, and what sets it apart from others of that model."""
    words = [f"{columns['steps']} steps"] if len(args.steps) > 1 and args.models else []
    words += [columns["dtype"]] if len(args.dtype) > 1 else []
    words += ["compiled"] if columns["compiled"] else []
    return {"configuration": ", ".join([columns["model"], *words]), **columns}


def macs_of(call):
    """Multiply-accumulates of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() // 2


def interleaved(calls, rounds, device, cpu_time=False):
    """Seconds of each call in each round, [[seconds of a round's first, second, ...], ...]; after a warm-up."""
    now = time.process_time if cpu_time else time.perf_counter

    def timed(call):
        began = now()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return now() - began

    for call in calls:
        timed(call)
    return [[timed(call) for call in calls] for _ in tqdm(range(rounds), desc="rounds")]


def summary(seconds, macs):
    """[columns] of each call: seconds, MACs (one number each), and the ratios to the first, round by round."""
    rows = []
    for index, count in enumerate(macs):
        ratios = [taken[index] / taken[0] for taken in seconds]
        low, middle, high = spread(ratios)
        rows.append(
            {
                "macs": count,
                "macs_ratio": count / macs[0],
                "seconds": [taken[index] for taken in seconds],
                "seconds_median": statistics.median(taken[index] for taken in seconds),
                "time_ratio": middle,
                "time_ratio_low": low,
                "time_ratio_high": high,
                "time_ratio_min": min(ratios),
                "time_ratio_max": max(ratios),
            }
        )
    return rows


def plot(rows, batch_size, path):
    """A picture with quartiles: time per image against steps, a line for each model as it runs; or bars of passes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = {}  # each model as it runs, to its rows
    for row in rows:
        kind = ", ".join([row["model"], row["dtype"], *["compiled"] * row["compiled"]])
        kinds.setdefault(kind, []).append((row.get("steps"), *(1000 * seconds for seconds in spread(row["seconds"]))))
    against_steps = "steps" in rows[0]
    size = (8, 5) if against_steps else (8, 1.2 + 0.5 * len(rows))
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    if against_steps:
        for kind, points in kinds.items():
            steps, low, middle, high = np.array(sorted(points)).T
            ms, error = middle / batch_size, np.array([middle - low, high - middle]) / batch_size
            axis.errorbar(steps, ms, error, marker="o", capsize=3, label=kind)
        axis.set(xlabel="steps", ylabel="ms per image", ylim=(0, None))
        axis.legend(fontsize=8)
    else:
        bars(axis, list(kinds), [points[0][1:] for points in kinds.values()], "ms per pass")
    figure.savefig(path, dpi=120)
    plt.close(figure)


@torch.no_grad()
def main(args):
    check_arguments(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    found = pipeline_calls(args) if args.models else unet_calls(args)
    macs = {plain: macs_of(plain) for plain in dict.fromkeys(plain for _, _, plain in found)}
    seconds = interleaved([call for _, call, _ in found], args.rounds, args.device, args.cpu_time)
    measured = summary(seconds, [macs[plain] for _, _, plain in found])
    rows = [{**named(args, columns), **more} for (columns, _, _), more in zip(found, measured)]
    results.print_table([[row] for row in rows], TABLE)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{args.rounds} rounds; peak resident memory {peak / 1e9:.2f} GB.", flush=True)
    if args.output:
        names = ("resolution", "batch_size", "steps", "rounds", "dtype", "torch_compile", "cpu_time")
        flags = {name: getattr(args, name) for name in names}
        report = {**circumstances(args.device), **flags, "peak_resident_bytes": peak, "rows": rows}
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n")
        plot(rows, args.batch_size, Path(args.output).with_suffix(".png"))


if __name__ == "__main__":
    run_script(main, parse_args())
