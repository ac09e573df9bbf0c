"""Try LoRAs that were made for a pipeline on what was compressed from it: one table, lora_compatibility_report.json.

    python recipes/check_loras.py --model output/quant --lora_dir output/test_loras --output_dir output

Each pipeline is sampled as it was saved: its own steps and guidance. docs/loras.md has what is reported.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import arguments, shapes
from common.compression.lora_check import REPORT, TABLE, check_loras, lora_files, rows_of
from common.compression.manifest import MANIFEST, read_manifest
from common.contract import TINY_SD, comes_from_tiny_sd, read_distillation
from common.judging.results import make_outdir, print_table
from common.pipelines import load_pipeline, read_pipeline_config
from common.run import run_script
from common.sampling import read_prompts_file

PROMPTS = Path(__file__).parent.parent / "prompts" / "coco20.txt"
STEPS = 25  # of a pipeline that is for no number of steps of its own


def parse_args(argv=None):
    parser = arguments.make_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="the compressed pipeline")
    add("--original", default=str(TINY_SD), help="the pipeline that the LoRAs were made for")
    add("--lora_dir", required=True, help="folder of LoRAs: .safetensors files, and folders as training writes them")
    add("--num_prompts", type=arguments.positive_int, default=8, help="images to try each LoRA on")
    add("--seed", type=arguments.seed, default=0, help="of the noise that the images start from")
    add("--output_dir", default="outputs/check_loras", help=f"where {REPORT} goes")
    return parser.parse_args(argv)


def sampling_of(path):
    """(steps, guidance scale) that a pipeline is sampled with."""
    contract = read_distillation(path)
    return contract.get("steps") or STEPS, contract["guidance_scale"]


def main(args):
    lora_files(args.lora_dir)
    for flag, path in (("--model", args.model), ("--original", args.original)):
        read_pipeline_config(path, flag=flag, quantized=True)
    make_outdir(args.output_dir)
    manifest = read_manifest(args.model) if (Path(args.model) / MANIFEST).is_file() else {}
    drawn = comes_from_tiny_sd(args.model)
    prompts = (shapes.held_out_captions(args.num_prompts) if drawn else read_prompts_file(PROMPTS))[: args.num_prompts]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = check_loras(
        load_pipeline(args.model, flag="--model").to(device),
        args.lora_dir,
        manifest,
        prompts,
        *sampling_of(args.model),
        seed=args.seed,
        teacher=load_pipeline(args.original, flag="--original").to(device),
        teacher_sampling=sampling_of(args.original),
        output=args.output_dir,
    )
    print_table(rows_of(found), TABLE)
    print(f"Done: {Path(args.output_dir) / REPORT}", flush=True)


if __name__ == "__main__":
    run_script(main, parse_args())
