"""Make a smaller student of a teacher pipeline: fewer blocks (BK-SDM, arXiv:2305.15798), narrower widths, or both.

The student UNet starts from the teacher's own weights (but for --random_init); the rest of the pipeline is the
teacher's. The output is a whole pipeline folder that stock diffusers loads, with compression.json: what came from
where, parameters and multiply-accumulates before and after. It draws nothing sensible yet: train_student_kd.py
teaches it.

    python prepare_unet_small.py --student_variant sd_small --output_dir outputs/sd_small
    python prepare_unet_small.py --student_variant sd_tiny --width_ratio 0.5 --dry_run
    python prepare_unet_small.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --block_out_channels 160 320 640 640 --output_dir outputs/sd15_half

    student_variant   UNet of SD1.5   what is removed
    sd_base             579,384,964   one of the two layers of every block (one of three in the up blocks)
    sd_small            482,346,884   the same, and the middle block
    sd_tiny             323,384,964   the same, and the deepest stage

These are BK-SDM's Base, Small and Tiny. Mind that Segmind calls Base "sd_small"; its "sd_tiny" is Tiny. In SDXL, whose
transformers have several layers, half of those go too.
"""

import common  # noqa: F401  first: it silences what importing diffusers would say

# isort: split
from pathlib import Path

from diffusers import UNet2DConditionModel

from common import arguments
from common.compression import students
from common.compression.manifest import MANIFEST
from common.contract import TINY_SD
from common.errors import UsageError
from common.model_files import check_weights
from common.pipelines import load_pipeline, read_pipeline_config
from common.randomness import seed_all
from common.run import run_script
from common.single_file import pipeline_folder


def parse_args(argv=None):
    parser = arguments.make_parser(__doc__)
    arguments.add_model_arguments(parser)
    add = parser.add_argument_group("student").add_argument
    add("--student_variant", choices=students.VARIANTS, help="blocks to remove (default: none)")
    add("--width_ratio", type=arguments.positive_float, help="all widths times this, such as 0.5 (at most 1)")
    add("--block_out_channels", type=arguments.positive_int, nargs="+", help="widths of the stages that are left")
    add(
        "--random_init",
        type=arguments.natural,
        metavar="SEED",
        help="take nothing over: weights drawn from this seed, to see what the teacher's are worth (default: start "
        "from the teacher's)",
    )
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default="outputs/student", help="where the student pipeline goes")
    add("--overwrite_output_dir", action="store_true", help="replace what the folder holds")
    add("--dry_run", action="store_true", help="only say what would be made; reads the UNet's config alone")
    return parser.parse_args(argv)


def check_arguments(args):
    """Refuse, before anything is loaded, what can't work; fill in the embedded default and the older spelling."""
    if args.variant in students.VARIANTS:
        if args.student_variant not in (None, args.variant):
            raise UsageError(f"--variant {args.variant}: --student_variant is given too, and is another.")
        print(f"--variant {args.variant} is taken as --student_variant {args.variant}, its name now.", flush=True)
        args.student_variant, args.variant = args.variant, None
    if args.width_ratio is not None and args.block_out_channels is not None:
        raise UsageError("--width_ratio and --block_out_channels both set the widths: give one of them.")
    if args.width_ratio is not None and args.width_ratio > 1:
        raise UsageError(
            f"--width_ratio {args.width_ratio:g} is more than 1: a student is not wider than its teacher."
        )
    if args.student_variant is None and args.width_ratio is None and args.block_out_channels is None:
        raise UsageError("nothing to do: give --student_variant, --width_ratio or --block_out_channels.")
    if args.pretrained_model_name_or_path is None:
        args.pretrained_model_name_or_path = str(TINY_SD)
        print("No --pretrained_model_name_or_path given: the teacher is the embedded tiny-sd.", flush=True)
    elif Path(args.pretrained_model_name_or_path).is_dir():  # what is written names it, and is read from elsewhere
        args.pretrained_model_name_or_path = str(Path(args.pretrained_model_name_or_path).absolute())


def check_output(args):
    """Refuse a folder that holds something, but for a student that --overwrite_output_dir gives up."""
    output = Path(args.output_dir)
    if args.dry_run or not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not output.is_dir() or not args.overwrite_output_dir:
        raise UsageError(f"--output_dir {output} is not empty: name another, or add --overwrite_output_dir.")
    if not (output / MANIFEST).is_file():
        raise UsageError(f"--output_dir {output} holds no {MANIFEST}, so it is not replaced.")


def student_widths(args, config):
    """block_out_channels of the student of a UNet with this config, or None where they stay."""
    if args.width_ratio is None:
        return args.block_out_channels
    left = students.student_config(config, args.student_variant)["block_out_channels"]
    return students.scaled_widths(left, args.width_ratio)


def print_table(teacher, student, costs, block_map=None):
    """What was kept, as text. teacher, student: configs; costs: students.costs; block_map: of a made student."""
    rows = [("", "teacher", "student")]
    for name in (
        "block_out_channels",
        "down_block_types",
        "mid_block_type",
        "layers_per_block",
        "transformer_layers_per_block",
    ):
        values = [config.get(name) for config in (teacher, student)]
        rows.append((name, *(", ".join(map(str, v)) if isinstance(v, list | tuple) else str(v) for v in values)))
    for name in ("parameters", "macs"):
        before, after = costs[name]["teacher"], costs[name]["student"]
        rows.append((name, f"{before:,}", f"{after:,} ({after / before:.1%})"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    print("\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows))
    for name, source in (block_map or {}).items():
        if name != source and ".transformer_blocks." not in name:
            print(f"{name} is the teacher's {source}")


def main(args):
    check_arguments(args)
    check_output(args)
    teacher = pipeline_folder(args.pretrained_model_name_or_path)
    origin = {"revision": args.revision, "variant": args.variant}
    read_pipeline_config(teacher, args.revision)  # a bad path is said before anything else
    check_weights(teacher, args.variant, f"--pretrained_model_name_or_path {teacher}")
    config = UNet2DConditionModel.load_config(teacher, subfolder="unet", revision=args.revision)
    # From here on every default of the class is in the config, as a model has it.
    config = dict(students.empty_unet(config).config)
    widths = student_widths(args, config)
    student = students.student_config(config, args.student_variant, widths)
    if args.dry_run:
        print_table(config, student, students.costs(config, student))
        return

    pipeline = load_pipeline(teacher, **origin)
    unet, manifest = students.build_student(pipeline.unet, args.student_variant, widths)
    if args.random_init is not None:
        seed_all(args.random_init)
        unet = UNet2DConditionModel.from_config(unet.config)
        manifest.update(block_map={}, keep=None)
    print_table(config, student, manifest, manifest["block_map"])
    pipeline.unet = unet
    students.save_untrained(args.output_dir, pipeline, manifest, teacher, **origin)
    print(f"Done: {args.output_dir}", flush=True)


if __name__ == "__main__":
    run_script(main, parse_args())
