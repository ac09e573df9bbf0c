"""Speed and memory of a training script under several sets of flags, and against somebody else's script.

    python benchmarks/training.py --script train_flash_lora.py --compare "" "--rollout_cache out/rollouts"
    python benchmarks/training.py --script train_lcm.py --compare "" "--torch_compile" -- --lora_rank 64
    python benchmarks/training.py --script train_lcm.py --resolution 64 --threads 1 --cpu_time \\
        --peer_script train_lcm_distill_lora_sd_wds.py --peer_flags "--lora_rank 64" -- --lora_rank 64

--compare: sets of flags, each in quotes, "" for none; the first is what the others are compared with. Flags after --
go to all of them. --peer_script is timed as one more set, on the same pipeline, images, captions and batch: they are
written as a webdataset shard, which our sets then read too, except one that reads a cache. What the peer imports must
be installed (webdataset, say); its own flags follow --peer_template, and --peer_flags come after those.

How to read it. Each round runs every set once, in turn, a-b-a-b, each in a fresh process, and divides its samples per
second by the first set's of the same round: what slows a whole round, such as a neighbour on the machine, falls out.
Printed are medians over the rounds, in brackets the quartiles, then the extremes of the ratio: where the bracket holds
1 there is no difference to speak of. A process makes --steps optimizer steps and is ended. The first --warmup of them
and all that comes before are left out (loading, compiling, a first look into a cache); what comes with every step is
in: data, logging, averages. Memory is the highest of the process, its start included; on a GPU also what torch
allocated there. On a machine with more work than cores --cpu_time leaves out the waiting for one, though not what
neighbours slow; data that workers load is then not in it (--dataloader_num_workers).

--peak_tflops counts the floating-point operations of one more step (torch's counter: products and convolutions of
every model, forward and backward) and says which share of the device's peak that is: its datasheet's dense figure for
the dtype, or "measure" for that of a large product in bf16. A set with --torch_compile can't be counted: it has the
operations of the set with the same other flags, if there is one.
"""

import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import peer  # noqa: E402
from benchmarks.shared import bars, circumstances, measured_peak, sd15_folder, spread  # noqa: E402
from common import arguments  # noqa: E402
from common.contract import TINY_SD  # noqa: E402
from common.errors import UsageError, UserError  # noqa: E402
from common.judging import results  # noqa: E402
from common.pipelines import read_pipeline_config  # noqa: E402
from common.run import run_script  # noqa: E402

TAIL = 5  # lines of a process that failed
TABLE = (  # heading, column, how its value is written
    ("s/step", "seconds_per_step", "{:.3f}".format),
    ("samples/s", "samples_per_second", "{:.2f}".format),
    ("ratio", "ratio", "{:.3f}".format),
    ("from", "ratio_min", "{:.3f}".format),
    ("to", "ratio_max", "{:.3f}".format),
    ("peak GB", "peak_resident_bytes", lambda peak: f"{peak / 1e9:.2f}"),
    ("GPU GB", "peak_gpu_bytes", lambda peak: f"{peak / 1e9:.2f}"),
    ("TFLOP/s", "tflops", "{:.3g}".format),
    ("of peak", "share_of_peak", "{:.1%}".format),
    ("against the peer", "against_peer", "{:.3f}".format),
)


def peak(text):
    return text if text == "measure" else arguments.positive_float(text)


def parse_args(argv=None):
    parser = arguments.make_parser(__doc__)
    add = parser.add_argument
    add("--script", required=True, help="training script, such as train_lcm.py")
    add("--compare", nargs="+", metavar="FLAGS", help='sets of flags, the first to compare with (default: "")')
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--pretrained_model_name_or_path", help="pipeline that is trained from (default: tiny-sd)")
    what.add_argument("--architecture", choices=("sd15",), help="its architecture with random weights instead")
    add("--resolution", type=arguments.positive_int, help="pixels per side (default: the model's own)")
    add("--batch_size", type=arguments.positive_int, default=16, help="samples per micro-batch")
    add("--steps", type=arguments.positive_int, default=20, help="optimizer steps of a process")
    add("--warmup", type=arguments.positive_int, default=5, help="the first of them, which don't count")
    add("--rounds", type=arguments.positive_int, default=3, help="how often each set runs")
    add("--threads", type=arguments.positive_int, help="of the CPU (default: torch's)")
    add("--cpu_time", action="store_true", help="take a process's seconds instead of the clock's: see above")
    add("--peak_tflops", type=peak, help='peak of the device in TFLOP/s, or "measure" (default: nothing is counted)')
    add("--peer_script", help="training script of somebody else, timed as the last set")
    add("--peer_flags", default="", metavar="FLAGS", help="more flags of the peer")
    add("--peer_template", default=peer.TEMPLATE, metavar="FLAGS", help="how the peer is told what all share")
    add(
        "--peer_samples",
        type=arguments.positive_int,
        help="images in the shard (default: so many that it does not end)",
    )
    add(
        "--peer_no_autocast",
        action="store_true",
        help="torch.autocast does nothing in the peer: diffusers' example has it around teacher and target, bf16 on a "
        "CPU and fp16 on a GPU, whatever --mixed_precision says",
    )
    add("--time_limit", type=arguments.positive_float, help="seconds after which no more is measured (default: none)")
    add("--keep_going", action="store_true", help="a set that fails is said and left out, instead of ending all")
    add("--work_dir", default="outputs/benchmarks", help="where runs are written, and deleted; sd15 stays")
    add("--output", help="JSON file of all that was measured, with a picture beside it")
    add("rest", nargs="*", help="flags of the script, after --, for all sets but the peer")
    argv = sys.argv[1:] if argv is None else argv
    return parser.parse_args(quoted([str(word) for word in argv], parser))


def quoted(argv, parser):
    """The command line with a space before each set of flags: argparse would take "--torch_compile" for a flag."""
    takes, words = None, []
    for number, word in enumerate(argv):
        if word == "--":
            return words + argv[number:]
        if word in parser._option_string_actions:
            takes = word
        elif takes in ("--compare", "--peer_flags", "--peer_template"):
            word = f" {word}"
        words.append(word)
    return words


def check_arguments(args):
    """Refuse, before anything runs, what can't work; fill in what was left open. Raises UserError."""
    for name in ("script", "peer_script"):
        path = getattr(args, name)
        if path and name == "script" and not Path(path).is_file() and (ROOT / path).is_file():
            args.script = path = str(ROOT / path)
        if path and not Path(path).is_file():
            raise UsageError(f"--{name} {path}: there is no such file.")
    if args.warmup >= args.steps:
        raise UsageError(f"--warmup {args.warmup} leaves nothing of --steps {args.steps}.")
    if args.cpu_time and (torch.cuda.is_available() or args.threads != 1):
        raise UsageError("--cpu_time needs --threads 1 and no GPU: several threads' seconds would add up.")
    if args.output and not Path(args.output).absolute().parent.is_dir():
        raise UsageError(f"--output {args.output}: there is no folder to write it into.")
    args.compare = args.compare or [""]
    for name in ("compare", "peer_flags", "peer_template"):
        try:
            value = getattr(args, name)
            found = [shlex.split(flags) for flags in (value if name == "compare" else [value])]
        except ValueError as error:
            raise UsageError(f"--{name}: {error}.") from None
        setattr(args, name, found if name == "compare" else found[0])
    args.peer_samples = args.peer_samples or peer.SHUFFLED + (args.steps + 4) * args.batch_size
    args.pretrained_model_name_or_path = args.pretrained_model_name_or_path or str(TINY_SD)
    peer.command(args, None, None)


def batch_size_of(command, default):
    """The samples of a micro-batch that a command line asks for: its last --batch_size, or the default."""
    size = default
    for word, following in zip(command, [*command[1:], ""]):
        name, equals, value = word.partition("=")
        if name in ("--batch_size", "--train_batch_size"):
            size = value if equals else following
    return int(size)


def command_of(args, flags, output_dir, shard=None):
    """The script and its flags of a set: what the benchmark says, the flags of all, those of the set."""
    own = [*args.rest, *flags]
    data = ["--data_dir", str(shard)] if shard else ["--dataset_name", "shapes"]
    if {"--data_dir", "--dataset_name", "--cache_dir", "--rollout_cache"} & {word.partition("=")[0] for word in own}:
        data = []  # a cache, too, says what data it is of
    return [
        *[args.script, "--pretrained_model_name_or_path", args.pretrained_model_name_or_path, *data],
        *[
            "--resolution",
            str(args.resolution),
            "--batch_size",
            str(args.batch_size),
            "--max_steps",
            str(args.steps + 1),
        ],
        *["--output_dir", str(output_dir), "--overwrite_output_dir", "--report_to", "none", *own],
    ]


def named(args):
    """{name: flags} of --compare, in its order, then of the peer, whose flags are None. Twice the same is (2)."""
    sets = {}
    for flags in args.compare:
        name = shlex.join(flags) or Path(args.script).name
        again = sum(flags == others for others in sets.values())
        sets[f"{name} ({again + 1})" if again else name] = flags
    return sets | ({f"peer: {Path(args.peer_script).name}": None} if args.peer_script else {})


def time_left(args):
    """Seconds until --time_limit, or None where there is none."""
    return None if args.time_limit is None else args.began + args.time_limit - time.monotonic()


class TimeIsUp(Exception):
    """--time_limit has come."""


def run_steps(args, name, command, work, of_peer=False):
    """What timed_steps.py notes of a command, a script and its flags, in a process of its own: a dict.

    Raises UserError, with the end of what it printed, where it fails, and TimeIsUp.
    """
    environment = {**os.environ}
    if Path(args.pretrained_model_name_or_path).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"  # nothing is asked for elsewhere
    if args.threads:
        environment["OMP_NUM_THREADS"] = str(args.threads)
    notes, said = work / "notes.json", work / "said.txt"
    counts = args.peak_tflops and "--torch_compile" not in command
    timed = [sys.executable, str(ROOT / "benchmarks/timed_steps.py"), "--notes", str(notes)]
    timed += ["--steps", str(args.steps), "--warmup", str(args.warmup)]
    timed += ["--threads", str(args.threads)] if args.threads else []
    timed += ["--cpu_time"] * args.cpu_time + ["--flops"] * bool(counts)
    timed += (["--cut_prompts"] + ["--no_autocast"] * args.peer_no_autocast) if of_peer else []
    left = time_left(args)
    if left is not None and left <= 0:
        raise TimeIsUp
    with open(said, "wb") as file:
        process = subprocess.Popen([*timed, *command], env=environment, stdout=file, stderr=subprocess.STDOUT)
        timer = threading.Timer(left or 0, process.kill)
        try:
            if left is not None:
                timer.start()
            process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:  # this one was interrupted
                process.kill()
    printed = said.read_text(errors="replace").splitlines()
    lines = [line for line in printed if line.strip() and "%|" not in line] or ["nothing was printed"]  # without bars
    if notes.is_file():  # written before operations are counted
        if process.returncode:
            print(f"{name}: its operations can't be counted ({lines[-1][-300:]}).", flush=True)
        return json.loads(notes.read_text())
    if left is not None and time_left(args) <= 0:
        raise TimeIsUp
    tail = "\n".join(line[-300:] for line in lines[-TAIL:])
    raise UserError(f"{Path(command[0]).name} as {name!r} ended with {process.returncode}:\n{tail}")


def measure(args, sets, shard):
    """{(round, set): notes} of the sets, {name: flags or, of the peer, None}, in turns.

    A set that fails is said and left out with --keep_going; at --time_limit what was measured is kept.
    """
    found, broken = {}, set()
    for number, name in itertools.product(range(args.rounds), sets):
        if name in broken:
            continue
        flags = sets[name]
        with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
            run = Path(folder) / "run"
            theirs = flags is None
            command = peer.command(args, shard, run) if theirs else command_of(args, flags, run, shard)
            try:
                notes = run_steps(args, name, command, Path(folder), theirs)
            except TimeIsUp:
                print(f"--time_limit {args.time_limit:g}: the rest is left out, from {name} on.", flush=True)
                break
            except UserError as error:
                if not args.keep_going:
                    raise
                print(f"{name}: left out, for {error}", flush=True)
                broken.add(name)
                continue
        notes["batch"] = batch_size_of(command, args.batch_size) * notes["accumulation"]
        notes["samples_per_second"] = notes["batch"] / notes["seconds_per_step"]
        found[number, name] = notes
        print(
            f"round {number + 1} of {args.rounds}, {name}: {notes['seconds_per_step']:.3f} s/step, "
            f"{notes['samples_per_second']:.2f} samples/s",
            flush=True,
        )
    return found


def with_spread(name, values):
    """{name: median, name_low and name_high: quartiles} of values, one a round; of one round there are none."""
    low, middle, high = spread(values)
    return {name: middle} | ({f"{name}_low": low, f"{name}_high": high} if len(values) > 1 else {})


def uncompiled(sets, name):
    """The set with the flags of a compiled one but for --torch_compile; None where there is none, or it isn't one."""
    if "--torch_compile" not in (sets[name] or ()):
        return None
    flags = [flag for flag in sets[name] if flag != "--torch_compile"]
    return next((other for other, others in sets.items() if others == flags), None)


def summary(found, sets, peak_tflops=None):
    """[columns] of each set that was measured: medians over its rounds; ratios to the first set, round by round.

    found: of `measure`. peak_tflops: of the device, or None. A row that ran beside the peer, whose flags are
    None, also says how many times the peer's samples per second it made, against_peer.
    """
    rows, first = [], next(iter(sets))
    flops = {name: notes["flops"] for (_, name), notes in found.items()}
    other = next((name for name, flags in sets.items() if flags is None), None)
    for name in sets:
        rounds = {number: notes for (number, of), notes in found.items() if of == name}
        if not rounds:
            continue

        def ratios(base):
            both = [number for number in rounds if (number, base) in found]
            return [rounds[n]["samples_per_second"] / found[n, base]["samples_per_second"] for n in both]

        row = {"configuration": name, "rounds": list(rounds.values())}
        for column in ("seconds_per_step", "samples_per_second"):
            row |= with_spread(column, [notes[column] for notes in rounds.values()])
        for column in ("peak_resident_bytes", "peak_gpu_bytes", "peak_gpu_reserved_bytes"):
            if all(notes[column] is not None for notes in rounds.values()):
                row[column] = max(notes[column] for notes in rounds.values())
        if against := ratios(first):
            row |= with_spread("ratio", against) | {"ratio_min": min(against), "ratio_max": max(against)}
        if other not in (None, name) and (against := ratios(other)):
            row |= with_spread("against_peer", against)
        if count := flops[name] or flops.get(uncompiled(sets, name)):
            row |= {"flops_per_step": count, "tflops": count / row["seconds_per_step"] / 1e12}
            row["share_of_peak"] = row["tflops"] / peak_tflops
        rows.append(row)
    return rows


def plot(rows, path):
    """A picture of samples per second, with their quartiles, and of peak memory: a bar for each set."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [row["configuration"] for row in rows]
    speeds = [spread([notes["samples_per_second"] for notes in row["rounds"]]) for row in rows]
    kind = "peak_gpu_bytes" if any("peak_gpu_bytes" in row for row in rows) else "peak_resident_bytes"
    peaks = [(row[kind] / 1e9,) * 3 if kind in row else None for row in rows]
    figure, axes = plt.subplots(1, 2, figsize=(10, 1.2 + 0.5 * len(rows)), sharey=True, layout="constrained")
    bars(axes[0], names, speeds, "samples per second")
    bars(axes[1], names, peaks, "peak GB, of the GPU" if kind == "peak_gpu_bytes" else "peak GB, resident")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(args):
    args.began = time.monotonic()
    check_arguments(args)
    Path(args.work_dir).mkdir(parents=True, exist_ok=True)
    if args.architecture:
        args.pretrained_model_name_or_path = str(sd15_folder(args.work_dir))
    model = args.pretrained_model_name_or_path
    _, native, factor = read_pipeline_config(model)
    args.resolution = args.resolution or native or 512
    if args.resolution % factor:
        raise UsageError(f"--resolution {args.resolution} is not a multiple of {factor}, the VAE's factor.")
    sets = named(args)
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        shard = None
        if args.peer_script:
            shard = Path(folder) / "shapes-000000.tar"
            peer.write_shard(shard, args.peer_samples, args.resolution)
        peak_tflops = measured_peak() if args.peak_tflops == "measure" else args.peak_tflops
        found = measure(args, sets, shard)
    rows = summary(found, sets, peak_tflops)
    if not rows:
        raise UsageError("nothing was measured: see above, and raise --time_limit where it came too early.")
    results.print_table([[row] for row in rows], TABLE)
    if args.output:
        flags = {name: value for name, value in vars(args).items() if name != "began"}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        report = {**circumstances(device), "flags": flags, "peak_tflops": peak_tflops, "rows": rows}
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n")
        plot(rows, Path(args.output).with_suffix(".png"))


if __name__ == "__main__":
    run_script(main, parse_args())
