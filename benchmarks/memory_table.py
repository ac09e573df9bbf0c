"""What training scripts need of each GPU at SD1.5's and SDXL's size, under every engine: estimated, on any machine.

    python benchmarks/memory_table.py --output outputs/memory.json
    python benchmarks/memory_table.py --models sdxl --scripts train_lcm.py train_guided.py --processes 16
    python benchmarks/memory_table.py --measure

By the estimate that every run prints first (docs/memory.md), of each script's own flags, on networks without memory, a
few seconds each: SD1.5 at 512 pixels, SDXL at 1024, batch 1, bf16. Printed are GB of each GPU without and with
--gradient_checkpointing, and behind each the smallest card that it fits, where CUDA and its allocator take 1 GB and
5 % beside it. LoRAs are not sharded, as their gradients and optimizer are a few MB. Of ZeRO-2 with offload, GB in
the CPU's memory are those of all processes together.

--measure instead runs scripts under every engine with 2 CPU processes on a random UNet of 55 M parameters, in fp32,
and prints what each process took, resident, beside the estimate. malloc is told to keep nothing, so that it is tensors
that are compared.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from benchmarks.shared import circumstances  # noqa: E402
from common import arguments, single_file  # noqa: E402
from common.engines import BLOCKS  # noqa: E402
from common.errors import UserError  # noqa: E402
from common.memory import Sharding  # noqa: E402
from common.run import run_script  # noqa: E402
from common.trial import make_networks, memory_of  # noqa: E402

MODELS = {"sd15": ("sd1", 512), "sdxl": ("sdxl", 1024)}  # configs of assets/single_file, pixels per side
TITLES = {"sd15": "SD1.5, 512 pixels", "sdxl": "SDXL, 1024 pixels"}
CARDS = (8, 16, 24, 40, 80)  # GB, of 10^9 bytes
MARGIN = 1e9, 1.05  # CUDA's context and libraries, bytes; what its allocator keeps in pieces, a factor
ENGINES = {
    "DDP": Sharding(),
    "FSDP2": Sharding("fsdp2", False, BLOCKS),
    "ZeRO-2": Sharding("zero2"),
    "ZeRO-2, offload": Sharding("zero2", True),
}
RANK = ["--lora_rank", "64"]
LORA = {f"train_{name}.py": RANK for name in ("lcm", "guided", "progressive", "add")} | {"train_flash_lora.py": []}
RECOVERY = ["--finetune_steps", "9", "--num_eval_images", "0"]
WHOLE = {f"train_{name}.py": [] for name in ("student_kd", "text_encoder_kd", "guided", "lcm", "progressive", "add")}
WHOLE |= {"prune_and_quantize.py": RECOVERY}
CONFIGS = {"DDP": "cpu", "FSDP2": "fsdp2", "ZeRO-2": "deepspeed_zero2"}  # of accelerate_configs/, where measured
MEASURED = {"train_lcm.py": [], "train_student_kd.py": []}


def parse_args(argv=None):
    parser = arguments.make_parser(__doc__)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), help="sizes")
    add("--scripts", nargs="+", choices=sorted({*LORA, *WHOLE}), help="training scripts (default: all)")
    add("--processes", type=arguments.positive_int, default=8, help="GPUs in all")
    add("--batch_size", type=arguments.positive_int, default=1, help="samples of each GPU")
    add("--output", help="JSON file of every row of every estimate, or of what was measured")
    add("--measure", action="store_true", help="run scripts on this machine's CPU instead: see above")
    add("--work_dir", default="outputs/memory", help="where --measure writes")
    return parser.parse_args(argv)


def write_model(kind, folder):
    """A pipeline as its configs say, with empty files in the place of weights: enough for all that comes before one
    loads."""
    configs = json.loads((single_file.ASSETS / f"{kind}.json").read_text())
    single_file.write_configs(configs, folder)
    for config in folder.glob("*/config.json"):
        save_file({}, config.with_name("diffusion_pytorch_model.safetensors"))


class Asked(Exception):
    """What a script asks `preflight`: (its settled arguments, its dataset, its guidance scale, about its networks)."""


def asked_by(script, flags):
    """The Asked of a script with these flags. It is run up to there."""
    module = importlib.import_module(script.removesuffix(".py"))

    def ask(args, dataset, guidance_scale=None, subfolder="", **method):
        raise Asked(args, dataset, guidance_scale, method)

    preflight, module.preflight = module.preflight, ask
    try:
        module.main(module.parse_args(flags))
    except Asked as asked:
        return asked.args
    finally:
        module.preflight = preflight
    raise AssertionError(f"{script} asked nothing")


def estimates(script, flags, engines, processes):
    """{(engine, whether gradients are checkpointed): the Estimate of each process on a GPU in bf16} of a script."""
    found = {}
    for checkpointing in (False, True):
        args, dataset, scale, method = asked_by(script, [*flags, *["--gradient_checkpointing"] * checkpointing])
        rows, needs_images = 1 if scale in (None, 1) else 2, getattr(dataset, "needs_images", False)
        for name, sharding in engines.items():
            networks = make_networks(args, torch.bfloat16, **method)
            asked = processes, rows, needs_images, sharding
            found[name, checkpointing] = memory_of(args, networks, "cuda", torch.bfloat16, *asked)
    return found


def card_for(count):
    """GB of the smallest of CARDS that so many bytes of tensors fit, or None."""
    needed = (count * MARGIN[1] + MARGIN[0]) / 1e9
    return next((card for card in CARDS if needed <= card), None)


def cell(found, engine):
    """What is printed of an engine: GB and the smallest card, without and with checkpointing; a dash of none."""
    totals = [found[engine, on].total for on in (False, True) if (engine, on) in found]
    cards = [card_for(total) for total in totals]
    return " / ".join(f"{t / 1e9:.1f} ({card or 'none'})" for t, card in zip(totals, cards)) or "-"


def table(head, rows):
    """Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def compare(args):
    """Print the tables; returns what is written of them."""
    report, scripts = [], args.scripts or sorted({*LORA, *WHOLE})
    with tempfile.TemporaryDirectory() as folder:
        folder, printed = Path(folder), {}
        for model in args.models:
            kind, resolution = MODELS[model]
            write_model(kind, folder / model)
            common = ["--pretrained_model_name_or_path", str(folder / model), "--resolution", str(resolution)]
            common += ["--dataset_name", "shapes", "--batch_size", str(args.batch_size), "--mixed_precision", "bf16"]
            common += ["--report_to", "none", "--output_dir", str(folder / "run")]
            for what, flags_of in (("LoRA", LORA), ("whole", WHOLE)):
                for script in (script for script in scripts if script in flags_of):
                    engines = {name: ENGINES[name] for name in ENGINES if name == "DDP" or what == "whole"}
                    found = estimates(script, [*common, *flags_of[script]], engines, args.processes)
                    printed[model, what, script] = found
                    for (engine, checkpointing), estimate in found.items():
                        row = {"model": model, "trained": what, "script": script, "flags": flags_of[script]}
                        row |= {"engine": engine, "gradient_checkpointing": checkpointing, "bytes": estimate.rows}
                        row |= {"total": estimate.total, "offloaded": estimate.offloaded}
                        report.append(row | {"card_gb": card_for(estimate.total)})
                    print(f"{TITLES[model]}, {what}, {script}: done", file=sys.stderr, flush=True)
    loras = [script for script in scripts if script in LORA]
    if loras:
        cells = [[f"`{s}`", *(cell(printed[model, "LoRA", s], "DDP") for model in args.models)] for s in loras]
        print(table(["a LoRA, DDP", *(TITLES[model] for model in args.models)], cells))
    for model in args.models:
        rows = []
        for script in (script for script in scripts if script in WHOLE):
            found = printed[model, "whole", script]
            away = found.get(("ZeRO-2, offload", False))
            away = f"{args.processes * away.offloaded / 1e9:.0f}" if away else "-"
            rows.append([f"`{script}`", *(cell(found, name) for name in ENGINES), away])
        if rows:
            print()
            print(table([f"{TITLES[model]}, whole", *ENGINES, "in the CPU's memory"], rows))
    return report


def build_random(folder):
    """tiny-sd with a UNet of 55 M random parameters."""
    from diffusers import UNet2DConditionModel

    from common.contract import TINY_SD
    from common.pipelines import load_pipeline

    pipeline, blocks = load_pipeline(TINY_SD), {"down_block_types": ["CrossAttnDownBlock2D"] * 3}
    blocks |= {"up_block_types": ["CrossAttnUpBlock2D"] * 3, "block_out_channels": (96, 192, 384)}
    width = pipeline.unet.config.cross_attention_dim
    pipeline.unet = UNet2DConditionModel(sample_size=8, norm_num_groups=8, cross_attention_dim=width, **blocks)
    pipeline.save_pretrained(folder)


def measure(args):
    """Print what scripts took under every engine beside their estimates; returns what is written of it."""
    work, found = Path(args.work_dir), []
    model = work / "random"
    if not (model / "model_index.json").is_file():
        build_random(model)
    kept = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment = {**os.environ, **kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for script, flags in MEASURED.items():
        for engine, config in CONFIGS.items():
            command = [sys.executable, "-m", "accelerate.commands.launch"]
            command += ["--config_file", str(ROOT / f"accelerate_configs/{config}.yaml"), "--num_processes", "2"]
            command += ["--mixed_precision", "no", str(ROOT / script), "--pretrained_model_name_or_path", str(model)]
            command += ["--dataset_name", "shapes", "--resolution", "64", "--batch_size", "4", "--max_steps", "3"]
            command += ["--report_to", "none", "--output_dir", str(work / "run"), "--overwrite_output_dir", *flags]
            done = subprocess.run(command, env=environment, text=True, capture_output=True)
            said = re.search(r"Peak memory (\S+ .B), estimated (\S+ .B) \((.\d+) %\)", done.stdout)
            if done.returncode or not said:
                raise UserError(f"{script} under {engine} ended with {done.returncode}:\n{done.stderr[-2000:]}")
            found.append(
                {"script": script, "engine": engine, **dict(zip(("peak", "estimated", "percent"), said.groups()))}
            )
            print(found[-1], file=sys.stderr, flush=True)
    rows = [
        [f"`{row['script']}`", row["engine"], row["peak"], row["estimated"], f"{row['percent']} %"] for row in found
    ]
    print(table(["", "2 processes under", "peak of each", "estimated", ""], rows))
    return found


def main(args):
    rows = measure(args) if args.measure else compare(args)
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        report = {**circumstances("cpu"), "flags": vars(args), "margin": MARGIN, "rows": rows}
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run_script(main, parse_args())
