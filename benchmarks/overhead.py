"""What a training step costs beyond its forward, backward and optimizer: those of the same tensors, in turns.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --architecture sd15 --resolution 128 --batch_size 1 --steps 12

Runs train_flash_lora.py with its roll-outs in memory, so that a step is the student's own. After each step it does the
bare minimum of that step once more: forward of the same tensors, loss, backward, and an update by a second AdamW. The
rest of the step is data, noise, averages, clipping, counting and logging. Printed is the median of the steps' ratios,
step over bare, with its quartiles. Where cores are shared --cpu_time takes this process's seconds.
"""

import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import train_flash_lora  # noqa: E402
from benchmarks.shared import sd15_folder  # noqa: E402
from common import arguments  # noqa: E402
from common.contract import TINY_SD  # noqa: E402
from common.run import Run, run_script  # noqa: E402


def parse_args(argv=None):
    parser = arguments.make_parser(__doc__)
    add = parser.add_argument
    add("--architecture", choices=("sd15",), help="random weights of this size (default: tiny-sd)")
    add("--work_dir", default="outputs/full_size", help="where they are written")
    add("--resolution", type=arguments.positive_int, default=64, help="pixels per side")
    add("--batch_size", type=arguments.positive_int, default=16, help="samples of a step")
    add("--steps", type=arguments.positive_int, default=40, help="steps that are timed, after four")
    add("--threads", type=arguments.positive_int, default=1, help="of the CPU")
    add("--cpu_time", action="store_true", help="this process's seconds instead of the clock's")
    add("flags", nargs="*", help="further flags of train_flash_lora.py, after --")
    return parser.parse_args(argv)


def main(args):
    torch.set_num_threads(args.threads)
    model = sd15_folder(args.work_dir) if args.architecture else TINY_SD
    seen, ratios, now = {}, [], time.process_time if args.cpu_time else time.perf_counter
    predict, loss, prepare, count = (
        train_flash_lora.predict, train_flash_lora.flash_loss, train_flash_lora.adamw, Run.count
    )  # fmt: skip

    def seen_predict(*given):
        seen["predict"] = given
        return predict(*given)

    def seen_loss(output, *given):
        seen["loss"] = given
        return loss(output, *given)

    def seen_adamw(parameters, flags):
        seen["optimizer"] = prepare(parameters, flags)
        return prepare(parameters, flags)

    def bare():
        began = now()
        loss(predict(*seen["predict"]), *seen["loss"]).backward()
        seen["optimizer"].step()
        seen["optimizer"].zero_grad(set_to_none=True)
        return now() - began

    def seen_count(run, *given, **more):
        count(run, *given, **more)
        step = now() - seen.get("began", now())
        alone = bare()
        if run.step > 4:
            ratios.append(step / alone)
        seen["began"] = now()

    train_flash_lora.predict, train_flash_lora.flash_loss, train_flash_lora.adamw = seen_predict, seen_loss, seen_adamw
    Run.count = seen_count
    with TemporaryDirectory() as folder:
        line = ["--pretrained_model_name_or_path", model, "--dataset_name", "shapes", "--output_dir", folder]
        line += ["--resolution", args.resolution, "--batch_size", args.batch_size, "--cache_rollouts", 2]
        line += ["--num_ddim_steps", 1, "--max_steps", args.steps + 4, "--checkpointing_steps", 10**6]
        flags = train_flash_lora.parse_args([*map(str, line), *args.flags])
        try:
            train_flash_lora.main(flags)
        finally:
            low, middle, high = statistics.quantiles(ratios, method="inclusive")
            print(f"step over bare: {middle:.3f} [{low:.3f}, {high:.3f}], {len(ratios)} steps", flush=True)


if __name__ == "__main__":
    run_script(main, parse_args())
