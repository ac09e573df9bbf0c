"""Time of smaller models against that of their original, taken in turns: what fewer multiply-accumulates come to.

    python benchmarks/inference.py --models assets/tiny-sd outputs/pruned/final outputs/pruned/final-int8
    python benchmarks/inference.py --architecture sd15 --ratio 0.3 0.5

--models: whole pipelines, sampled without guidance, decode included. --architecture: passes of the UNet alone, with
random weights, as it is and with that share of the insides of its resnets and feed-forwards gone.

After a warm-up everything runs once in each round, a-b-c-a-b-c, and each is divided by the first of the same round:
what slows a whole round, a neighbour on the machine, say, falls out. Printed are MACs (torch's counter) and times,
both also as ratios to the first: the median over the rounds, in brackets the quartiles, then the extremes. On a
machine with more work than cores --cpu_time leaves out the waiting for one, though not what its neighbours slow.
Models with INT8 weights keep the dtype that the rest of them was saved in, bfloat16, whatever --dtype says.
"""

import json
import resource
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from diffusers import UNet2DConditionModel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402

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
    add("--steps", type=arguments.positive_int, help="--models: sampling steps (default: 10)")
    add("--rounds", type=arguments.positive_int, default=20, help="how often each runs")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: fp16 on CUDA, else fp32")
    add("--threads", type=arguments.positive_int, help="of the CPU (default: torch's)")
    add("--cpu_time", action="store_true", help="take this process's seconds instead of the clock's: see above")
    add("--output", help="JSON file of all that was measured")
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
    if args.dtype == "auto":
        args.dtype = "fp16" if args.device == "cuda" else "fp32"
    if args.dtype == "fp16" and args.device == "cpu":
        raise UsageError("--dtype fp16 needs a GPU: use fp32 or bf16.")
    found = [read_pipeline_config(path, flag="--models", quantized=True) for path in args.models or ()]
    args.resolution = args.resolution or (found[0][1] if found else 256)
    for factor in [factor for _, _, factor in found] or [FACTOR]:
        if args.resolution % factor:
            raise UsageError(f"--resolution {args.resolution} is not a multiple of {factor}, the VAE's factor.")
    if args.cpu_time and (args.device != "cpu" or args.threads != 1):
        raise UsageError("--cpu_time needs --device cpu and --threads 1: several threads' seconds would add up.")
    args.ratio, args.steps = args.ratio or [0.3], args.steps or 10


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
    """{name: (columns, call)} of the architecture's UNet, as it is and pruned at each of --ratio."""
    dtype, side = DTYPES[args.dtype], args.resolution // FACTOR
    found = {}
    for ratio in (0.0, *args.ratio):
        unet = build_unet(args.architecture, ratio, dtype, args.device)
        options = {"device": args.device, "dtype": dtype}
        z = torch.randn(args.batch_size, unet.config.in_channels, side, side, **options)
        text = torch.randn(args.batch_size, TOKENS, unet.config.cross_attention_dim, **options)
        name = f"{args.architecture}, {ratio:g} gone" if ratio else args.architecture
        columns = {"dtype": args.dtype, "parameters": channels.count(unet)}
        found[name] = columns, lambda unet=unet, z=z, text=text: unet(z, 500, text)
    return found


def pipeline_calls(args):
    """{name: (columns, call)} of the pipelines of --models, each making --batch_size images."""
    found = {}
    for path in args.models:
        pipeline = load_pipeline(path, DTYPES[args.dtype], flag="--models")
        keep_vae_right(pipeline)
        pipeline.to(args.device)
        modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
        columns = {
            "dtype": quantization_of(path) or args.dtype,
            "parameters": sum(channels.count(module) for module in modules),
        }
        call = {
            "prompt": ["a photo"] * args.batch_size,
            "num_inference_steps": args.steps,
            "guidance_scale": 1.0,
            "height": args.resolution,
            "width": args.resolution,
        }
        found[path] = columns, lambda pipeline=pipeline, call=call: sample_timed(pipeline, args.device, **call)
    return found


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
        low, _, high = statistics.quantiles(ratios, method="inclusive") if len(ratios) > 1 else ratios * 3
        rows.append(
            {
                "macs": count,
                "macs_ratio": count / macs[0],
                "seconds": [taken[index] for taken in seconds],
                "seconds_median": statistics.median(taken[index] for taken in seconds),
                "time_ratio": statistics.median(ratios),
                "time_ratio_low": low,
                "time_ratio_high": high,
                "time_ratio_min": min(ratios),
                "time_ratio_max": max(ratios),
            }
        )
    return rows


@torch.no_grad()
def main(args):
    check_arguments(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    named = pipeline_calls(args) if args.models else unet_calls(args)
    calls = [call for _, call in named.values()]
    macs = [macs_of(call) for call in calls]
    measured = summary(interleaved(calls, args.rounds, args.device, args.cpu_time), macs)
    rows = [{"configuration": name, **columns, **more} for (name, (columns, _)), more in zip(named.items(), measured)]
    results.print_table([[row] for row in rows], TABLE)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{args.rounds} rounds; peak resident memory {peak / 1e9:.2f} GB.", flush=True)
    if args.output:
        flags = {
            name: getattr(args, name) for name in ("resolution", "batch_size", "steps", "rounds", "dtype", "cpu_time")
        }
        report = {**results.circumstances(args.device), **flags, "peak_resident_bytes": peak, "rows": rows}
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run_script(main, parse_args())
