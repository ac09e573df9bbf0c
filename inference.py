"""Generate images, and measure what distillation bought: models and step counts side by side, timed and judged.

Takes any output of this repository, any Stable Diffusion pipeline or LoRA, and pipelines of FLUX, SD3 and PixArt.
Scheduler, timesteps and guidance are those saved with the weights (scheduler/ and distillation.json); for an outside
LoRA they come from --scheduler and --guidance_scale. It says which.

    python inference.py --prompt "a small red circle above a large blue square on a white background"
    python inference.py --lora_path outputs/flash_lora/lora/final --steps 2 4 8 --compare_baseline
    python inference.py --lora_path jasperai/flash-sd --steps 4 \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5

A configuration is a model at a step count: the student at each of --steps, and with --compare_baseline the teacher at
--baseline_steps and, undistilled, at each of --steps (trailing DDIM both). Image j of prompt i starts from the same
noise in every configuration. In --output_dir:

    images/<configuration>/<i>_<prompt>_<j>.png
    grid_steps.png         prompts (the first 8) down, the student's step counts across
    grid_comparison.png    the same with baseline and undistilled teacher beside it (--compare_baseline)
    results.csv            a row per configuration and prompt, and one with prompt "all" per configuration, which alone
                           has the 95 % intervals (_low, _high) and the Fréchet distance
    results.json           the same with settings, timesteps, image files and versions

Time is per image of batches of --batch_size, device-synchronised, after a warm-up call: text encoding, UNet and VAE
decode (without PNG files); `_without_decode` leaves the VAE out. A prompt's time is its share of its batches.
`speedup` and `_retention` (quality kept) are ratios to the baseline. clip_score is 100 max(0, cos), `preference` the
score of --preference_model, `preference_win` the share of images that it prefers over the baseline's.
"""

import gc
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import ImageOps
from tqdm.auto import tqdm

from common import arguments, pipelines
from common.compression.lora_conversion import load_converted
from common.compression.quantized_folders import quantization_of
from common.contract import comes_from_tiny_sd, parent_source, pipeline_source, read_distillation, sampling_guidance
from common.errors import UsageError
from common.images import ImageError, open_image
from common.judging import metrics, results
from common.judging.previews import image_grid
from common.lora import check_lora_path
from common.pipelines import image_to_image, keep_vae_right, load_pipeline, resolution_of
from common.randomness import sample_generator
from common.run import run_script
from common.sampling import (
    asked_prompts,
    check_held_out,
    default_batch_size,
    place,
    read_prompts_file,
    sample_timed,
    sampled_size,
    settle_device,
    slug,
)
from common.schedulers import ddim_scheduler, list_timesteps, saved_scheduler, scheduler_for, student_scheduler
from common.single_file import pipeline_folder

PROMPTS = Path(__file__).resolve().parent / "prompts"
SCHEDULERS = {
    "lcm": "LCM on trailing timesteps",
    "lcm50": "LCM on its own grid of 50 timesteps",
    "ddim": "DDIM on trailing timesteps",
}
SETTINGS = ("seed", "batch_size", "resolution", "num_images", "clip_model", "preference_model", "negative_prompt")
GRID_PROMPTS = 8
MIN_FRECHET_IMAGES = 200


def parse_args(argv=None):
    parser = arguments.make_parser(__doc__)
    add = parser.add_argument_group("model").add_argument
    add(
        "--pretrained_model_name_or_path",
        help="pipeline: folder, file or hub id (default: the LoRA's parent or tiny-sd)",
    )
    add("--revision", help="revision of the hub id (default: of the LoRA's parent, as recorded)")
    add("--variant", help="file variant of the pipeline, such as fp16 (default: of the LoRA's parent, as recorded)")
    add("--lora_path", help="LoRA: a final/ folder of this repository, or any folder, .safetensors file or hub id")
    add("--lora_scale", type=float, default=1.0, help="strength of the LoRA; its alpha comes with its file")
    add("--fuse_lora", action="store_true", help="merge the LoRA into the weights: faster, equal up to rounding")
    add(
        "--scheduler",
        choices=tuple(SCHEDULERS),
        help="for weights that came without one: lcm or ddim on trailing timesteps (Flash LoRAs), or lcm50 on LCM's "
        "own grid of 50 timesteps (LCM-LoRAs) (default: lcm for an outside LoRA)",
    )
    arguments.add_prompt_arguments(parser, "prompts/shapes20.txt or prompts/coco20.txt")
    add = parser.add_argument_group("sampling").add_argument
    add("--steps", type=arguments.positive_int, nargs="+", help="step counts (default: what the student learned)")
    add("--num_images", type=arguments.positive_int, default=1, help="images per prompt")
    add(
        "--batch_size",
        type=arguments.positive_int,
        help="images per pipeline call (default: 64 at up to 64 pixels a side, 8 at up to 512, 4 above)",
    )
    add("--seed", type=arguments.seed, default=0, help="all noise derives from (seed, prompt, image)")
    add("--guidance_scale", type=float, help="classifier-free guidance (default: what was saved, else 1 for a LoRA)")
    add("--negative_prompt", help="what to guide away from; works only with guidance")
    add("--resolution", type=arguments.positive_int, help="pixels per side (default: the model's own)")
    add("--init_image", help="start from this image: image-to-image")
    add("--strength", type=float, help="share of the steps that --init_image is taken through (default: 0.8)")
    add = parser.add_argument_group("comparison").add_argument
    add("--compare_baseline", action="store_true", help="also the teacher: --baseline_steps, and undistilled --steps")
    add("--baseline_steps", type=arguments.positive_int, default=50, help="DDIM steps of the baseline")
    add("--baseline_guidance_scale", type=float, help="teacher's guidance (default: what it was saved with, else 7.5)")
    add("--clip_model", help="CLIP that judges: folder, hub id or 'none' (default: tiny-clip for shapes, else none)")
    add("--reader", help="reader of scenes or of classes: folder or 'none' (default: tiny-reader for shapes)")
    arguments.add_preference_model(add)
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", "--outdir", default="outputs/inference", help="where images, grids and results go")
    add("--save_images", type=int, help="images saved per configuration (default: all up to 200, else the first 64)")
    add = arguments.add_device_arguments(parser).add_argument
    add("--dtype", choices=("auto", "fp32", "fp16", "bf16"), default="auto", help="auto: fp16 on CUDA, else fp32")
    add("--torch_compile", action="store_true", help="compile the UNet")
    return parser.parse_args(argv)


def check_arguments(args):
    """Refuse, before anything is loaded, what can't work; fill in device, dtype and strength."""
    check_held_out(args)
    if args.strength is not None and not args.init_image:
        raise UsageError("--strength is for image-to-image: add --init_image or leave it out.")
    args.pretrained_model_name_or_path = pipeline_folder(args.pretrained_model_name_or_path)
    args.strength = 0.8 if args.strength is None else args.strength
    if not 0 < args.strength <= 1:
        raise UsageError(f"--strength {args.strength:g} is not in (0, 1].")
    for name in ("guidance_scale", "baseline_guidance_scale", "save_images"):
        if (getattr(args, name) or 0) < 0:
            raise UsageError(f"--{name} {getattr(args, name):g} is negative.")
    if not args.lora_path and (args.fuse_lora or args.lora_scale != 1):
        raise UsageError("--fuse_lora and --lora_scale are about a LoRA: add --lora_path or leave them out.")
    if args.resolution and args.resolution % 8:
        raise UsageError(f"--resolution {args.resolution} is not a multiple of 8.")
    if Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
        raise UsageError(f"--output_dir {args.output_dir} is a file, not a folder.")
    settle_device(args)


@dataclass
class Plan:
    """What is sampled, decided from the flags and the distillation.json files alone, before any model loads."""

    model: dict  # source of the student's pipeline (with a LoRA: of the one that it goes on)
    teacher: dict  # source of the baseline's pipeline
    contract: dict  # distillation.json of the student; {} where there is none
    scheduler_from: str  # "lora", "pipeline" or "flag"
    steps: list
    guidance_scale: float
    teacher_guidance_scale: float


@dataclass
class Configuration:
    name: str
    role: str  # baseline, undistilled or student
    steps: int
    guidance_scale: float
    scheduler: object
    timesteps: list


def make_plan(args):
    """The Plan of these arguments; prints where scheduler and guidance come from. Raises UsageError."""
    lora = args.lora_path
    ours = lora is not None and check_lora_path(lora)
    contract = read_distillation(lora) if ours else {}
    model = teacher = pipeline_source(args, contract, lora)
    if lora is None:
        contract = pipelines.contract_of(model["path"], model["revision"])
        if contract.get("parent") and args.compare_baseline:
            teacher = parent_source(contract, model["path"])
    distilled = bool(contract.get("steps"))
    if distilled and args.scheduler:
        raise UsageError(f"--scheduler {args.scheduler}: these weights came with theirs; leave the flag out.")
    scheduler_from = "lora" if ours else "flag" if lora or args.scheduler else "pipeline"
    steps = list(dict.fromkeys(args.steps or [contract["steps"] if distilled else 4 if lora else 50]))
    for count in steps + [args.baseline_steps] * args.compare_baseline:
        if args.init_image and int(count * args.strength) == 0:
            raise UsageError(f"{count} steps at --strength {args.strength:g} leave none to run: raise one of them.")
        if count > 1000:
            raise UsageError(f"{count} steps are more than the 1000 timesteps of the model.")
    if args.scheduler == "lcm50" and max(steps) > 50:
        raise UsageError(f"--scheduler lcm50: {max(steps)} steps are more than the 50 of its grid.")

    guidance_scale, why = sampling_guidance(contract, args.guidance_scale, "--guidance_scale", bool(lora) and not ours)
    given, flag = args.baseline_guidance_scale, "--baseline_guidance_scale"
    teacher_scale, _ = sampling_guidance(read_distillation(teacher["path"]), given, flag)
    if args.negative_prompt and max(guidance_scale, teacher_scale if args.compare_baseline else 0) <= 1:
        raise UsageError("--negative_prompt has no effect on weights that run without guidance: leave it out.")
    named = SCHEDULERS[args.scheduler or "lcm"] + (", from --scheduler" if args.scheduler else ", the default")
    source = {"lora": f"saved with {lora}", "pipeline": f"saved with {model['path']}", "flag": named}
    if ours and Path(model["path"]).name != Path(str(contract.get("parent"))).name:
        print(f"Note: the LoRA was made from {contract.get('parent')} and is used on {model['path']}.")
    print(f"Scheduler: {source[scheduler_from]}.\nGuidance: {why}.", flush=True)
    return Plan(model, teacher, contract, scheduler_from, steps, guidance_scale, teacher_scale)


def read_prompts(args, plan):
    """The prompts of --prompt, --held_out_captions or --prompts_file, else of the file that suits the model."""
    default = "shapes20.txt" if comes_from_tiny_sd(plan.model["path"]) else "coco20.txt"
    return asked_prompts(args) or read_prompts_file(PROMPTS / default)


def load_model(source, args, lora=None):
    """The pipeline, image-to-image where asked, with the LoRA if any, on the device in the asked precision."""
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.dtype]
    pipeline = load_pipeline(dtype=dtype, **source)
    if args.init_image:
        pipeline = image_to_image(pipeline)
    keep_vae_right(pipeline)
    if lora:
        load_converted(pipeline, lora, source["path"], args.lora_scale, args.fuse_lora)
    if args.torch_compile:
        getattr(pipeline, "unet", getattr(pipeline, "transformer", None)).compile()
    place(pipeline, args)
    return pipeline


def student_configurations(args, plan, pipeline):
    """One Configuration per step count of the student, with the scheduler that belongs to its weights."""
    saved, trained = pipeline.scheduler, plan.contract.get("steps")
    if plan.scheduler_from == "lora":
        saved = saved_scheduler(args.lora_path)
    found = []
    for steps in plan.steps:
        scheduler = scheduler_for(saved, plan.contract, steps)
        if plan.scheduler_from == "flag":
            scheduler = student_scheduler(saved, "next" if args.scheduler == "ddim" else "x0", steps)
            if args.scheduler == "lcm50":
                scheduler = type(scheduler).from_config(scheduler.config, original_inference_steps=50)
        timesteps = list_timesteps(scheduler, steps)
        note = "" if trained in (None, steps) else f" (trained for {trained} steps: {plan.contract.get('timesteps')})"
        shown = (timesteps or "those of each call") if len(timesteps) <= 16 else f"{timesteps[:3]} ... {timesteps[-1]}"
        print(f"Timesteps: {steps} steps of {type(scheduler).__name__} at {shown}{note}.", flush=True)
        name = "student" if args.lora_path or trained else "model"
        guided = f" w={plan.guidance_scale:g}" if plan.guidance_scale > 1 else ""
        found.append(
            Configuration(f"{name} {steps} steps{guided}", "student", steps, plan.guidance_scale, scheduler, timesteps)
        )
    return found


def teacher_configurations(args, plan, pipeline):
    """The baseline, and the undistilled teacher at each of --steps: trailing DDIM at the teacher's guidance."""
    found, scale = [], plan.teacher_guidance_scale
    for role, steps in [("baseline", args.baseline_steps), *(("undistilled", steps) for steps in plan.steps)]:
        scheduler = ddim_scheduler(pipeline.scheduler, steps)
        note = " (undistilled)" if role == "undistilled" else ""
        name = f"teacher {steps} steps w={scale:g}{note}"
        found.append(Configuration(name, role, steps, scale, scheduler, list_timesteps(scheduler, steps)))
    return found


def generate(pipeline, configuration, prompts, init_image, args):
    """All images of a configuration, timed. Returns a dict: images (PIL), files, seconds (per image), memory."""
    jobs = [(i, j) for i in range(len(prompts)) for j in range(args.num_images)]
    batches = [jobs[start : start + args.batch_size] for start in range(0, len(jobs), args.batch_size)]
    cuda = torch.device(args.device).type == "cuda"
    pipeline.scheduler = configuration.scheduler
    start_from = {"height": args.resolution, "width": args.resolution}
    if init_image is not None:
        start_from = {"image": ImageOps.fit(init_image, (args.resolution,) * 2), "strength": args.strength}

    def run(batch, steps):
        return sample_timed(
            pipeline,
            args.device,
            prompt=[prompts[i] for i, _ in batch],
            num_inference_steps=steps,
            **({"negative_prompt": [args.negative_prompt] * len(batch)} if args.negative_prompt else {}),
            guidance_scale=configuration.guidance_scale,
            generator=[sample_generator(args.seed, i, j) for i, j in batch],
            **start_from,
        )

    for size in {len(batch) for batch in batches}:  # the warm-up: every batch size, few steps where that is possible
        run(jobs[:size], configuration.steps if init_image is not None else min(2, configuration.steps))
    if cuda:
        torch.cuda.reset_peak_memory_stats(args.device)
    limit = (len(jobs) if len(jobs) <= 200 else 64) if args.save_images is None else args.save_images
    folder = Path(args.output_dir) / "images" / slug(configuration.name)
    seconds = {"seconds_per_image": [], "seconds_per_image_without_decode": []}
    made = {"images": [], "files": [], "seconds": seconds}
    with tqdm(total=len(jobs), desc=configuration.name, unit="image") as bar:
        for batch in batches:
            pixels, without_decode, total = run(batch, configuration.steps)
            images = pipeline.image_processor.postprocess(pixels, output_type="pil")
            seconds["seconds_per_image"] += [total / len(batch)] * len(batch)
            seconds["seconds_per_image_without_decode"] += [without_decode / len(batch)] * len(batch)
            for image, (i, j) in zip(images, batch):
                if len(made["files"]) < limit:
                    file = folder / f"{i:04d}_{slug(prompts[i])[:40]}_{j}.png"
                    folder.mkdir(parents=True, exist_ok=True)
                    image.save(file)
                    made["files"].append(str(file.relative_to(args.output_dir)))
            made["images"] += images
            bar.update(len(batch))
    if cuda:
        peak = torch.cuda.max_memory_allocated(args.device) / 2**20
    else:  # Linux counts in KiB, macOS in bytes
        unit = 2**20 if sys.platform == "darwin" else 2**10
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    kind = "CUDA allocated" if cuda else "peak RSS of the process so far"
    made["memory"] = {"peak_memory_mib": peak, "peak_memory_kind": kind}
    return made


def report_of(args, plan, runs, prompts, judges):
    """results.json: the settings, and every configuration with its rows, timesteps and files."""
    models = [plan.model, *([{"path": args.lora_path}] if args.lora_path else [])]
    models += [plan.teacher] if runs[0][0].role == "baseline" and plan.teacher != plan.model else []
    split = args.held_out_split if args.held_out_captions else None
    return {
        "manifest": results.manifest(args.device, args.seed, prompts, split, judges, models),
        "model": plan.model["path"],
        "revision": plan.model["revision"],
        "variant": plan.model["variant"],
        "lora": args.lora_path,
        "teacher": plan.teacher["path"],
        "dtype": "as saved" if quantization_of(plan.model["path"], plan.model["revision"]) else args.dtype,
        **{name: getattr(args, name) for name in SETTINGS},
        "init_image": args.init_image,
        "strength": args.strength if args.init_image else None,
        "configurations": [
            {
                **rows[0],
                "scheduler": type(configuration.scheduler).__name__,
                "timesteps": configuration.timesteps,
                "files": made["files"],
                "per_prompt": rows[1:],
            }
            for configuration, rows, made in runs
        ],
    }


def write_grids(args, runs, prompts):
    """grid_steps.png of the student, grid_comparison.png of everything, by step count."""
    order = {"baseline": 0, "undistilled": 1, "student": 2}
    runs = sorted(runs, key=lambda run: (run[0].role != "baseline", run[0].steps, order[run[0].role]))
    students = [run for run in runs if run[0].role == "student"]
    for name, chosen in (("grid_steps.png", students), ("grid_comparison.png", runs if args.compare_baseline else [])):
        if chosen:
            pictures = [list(row) for row in zip(*(made["shown"] for _, _, made in chosen))]
            labels = [f"{c.role} {c.steps}" for c, _, _ in chosen]
            image_grid(pictures, prompts[:GRID_PROMPTS], labels).save(Path(args.output_dir) / name)


def main(args):
    check_arguments(args)
    plan = make_plan(args)
    prompts = read_prompts(args, plan)
    init_image = None
    if args.init_image:
        try:
            init_image = open_image(args.init_image)
        except ImageError as error:
            raise UsageError(f"--init_image {args.init_image} can't be used: {error}.") from None
    native = sampled_size(args, plan.model)
    args.resolution = resolution_of(args, native, plan.model["path"])
    args.batch_size = args.batch_size or default_batch_size(args.resolution)
    results.make_outdir(args.output_dir)
    clip, reader = results.load_judges(args.clip_model, args.reader, prompts, args.device)
    preference = results.load_preference_model(args.preference_model, args.device)
    judges = {"clip": clip, "reader": reader, "preference": preference}
    captions = [prompt for prompt in prompts for _ in range(args.num_images)]
    real = None  # held-out captions are compared with the pictures that were drawn for them
    if clip and args.held_out_captions and len(captions) >= MIN_FRECHET_IMAGES:
        real = metrics.shapes_real_features(clip, split=args.held_out_split)
    results.begin(args.output_dir)
    runs = []  # (Configuration, rows, what was made), the teacher's first
    # The student first: what it lacks shows before the long baseline runs, and its peak memory is its own.
    stages = [(plan.model, args.lora_path, student_configurations)]
    if args.compare_baseline:
        stages.append((plan.teacher, None, teacher_configurations))
    try:
        for path, lora, configurations in stages:
            pipeline = load_model(path, args, lora)
            teachers = []
            for configuration in configurations(args, plan, pipeline):
                made = generate(pipeline, configuration, prompts, init_image, args)
                figures = results.judged(made["images"], captions, clip, reader, real, preference)
                columns = {
                    "configuration": configuration.name,
                    "role": configuration.role,
                    "steps": configuration.steps,
                    "guidance_scale": configuration.guidance_scale,
                    "batch_size": args.batch_size,
                    **made["memory"],
                }
                rows = results.rows_of(columns, figures, made["seconds"], prompts)
                made["shown"] = made.pop("images")[: GRID_PROMPTS * args.num_images : args.num_images]
                (runs if configuration.role == "student" else teachers).append((configuration, rows, made))
                finished, made["scores"] = teachers + runs, figures["per_image"].get("preference")
                table = [rows for _, rows, _ in finished]
                results.add_ratios(table)
                results.add_wins(table, [made["scores"] for _, _, made in finished])
                report = report_of(args, plan, finished, prompts, judges)
                results.write_results(args.output_dir, table, report)
            runs = teachers + runs
            del pipeline
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    except KeyboardInterrupt:
        print(f"\nInterrupted: {args.output_dir} holds what was finished.", file=sys.stderr, flush=True)
        sys.exit(130)
    except torch.OutOfMemoryError:  # CUDA's
        raise UsageError(
            f"Out of GPU memory at --batch_size {args.batch_size} and {args.resolution} pixels a side: lower "
            "--batch_size, or add --attention_slicing, --vae_slicing, --vae_tiling or --cpu_offload."
        ) from None
    write_grids(args, runs, prompts)
    results.print_table([rows for _, rows, _ in runs])
    print(f"Images, grids, results.csv and results.json are in {args.output_dir}.", flush=True)


if __name__ == "__main__":
    run_script(main, parse_args())
