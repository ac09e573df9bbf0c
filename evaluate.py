"""Judge outputs side by side: FID, CLIP score, R-precision, scene accuracy, LPIPS, parameters, bytes and time.

    python evaluate.py --models assets/tiny-sd out/kd/final --steps 25 --num_images 200 --output_dir out/eval
    accelerate launch --multi_gpu --num_processes 8 evaluate.py --data_dir coco --num_images 30000 \\
        --models stable-diffusion-v1-5/stable-diffusion-v1-5 out/kd/final --steps 4 25 --guidance_scale 3 \\
        --clip_model openai/clip-vit-base-patch32 --inception_path download --lpips_trunk_path download
    python evaluate.py --models folder/of/images other/images --real_dir photos --inception_path weights.pth

A model is a pipeline (folder or hub id), a LoRA of this repository (its final/), or a folder of images. Scheduler,
timesteps and guidance are those saved with it. Image j of caption i starts from the noise of (seed, i, j) in every
model, whatever the number of processes. A folder's images go with the captions in the order of their names, numbers
taken as numbers. Everything is compared with the first model, or --reference. In --output_dir:

    results.csv, results.json   a row per configuration (a model at a step count), with 95 % bootstrap intervals
    quality_steps.png           quality against steps (several step counts); quality_size.png: against parameters
    grid.png                    the first captions down, configurations across
    images/<n>-<configuration>/ what was sampled

Only Inception's features give what is called FID; CLIP's give "Fréchet (CLIP)". A network that is not there is said to
be missing, or refused where a flag asked for it. Features of the real images are kept in --cache_dir.
"""

import gc
import os
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from PIL import ImageOps

from common import arguments
from common.compression.lora_conversion import load_converted
from common.contract import TINY_SD
from common.errors import UsageError
from common.judging import metrics, planning, results
from common.judging.image_sets import open_file, real_features, sharded, to_pixels
from common.judging.planning import (
    NUM_IMAGES,
    bytes_on_disk,
    check_captions,
    plan_captions,
    plan_models,
    plan_real_images,
)
from common.judging.previews import image_grid
from common.pipelines import keep_vae_right, load_pipeline
from common.randomness import sample_generator
from common.run import run_script
from common.sampling import default_batch_size, sample_timed, slug
from common.schedulers import list_timesteps, saved_scheduler, scheduler_for

GRID_IMAGES = 8
READ = ("scene_accuracy", "class_accuracy", "preference", "lpips")  # figures of judge_batch that need only the image
SIZES = ("unet_parameters", "text_encoder_parameters", "vae_parameters", "parameters", "bytes_on_disk")
COLUMNS = (
    *(name for name in results.COLUMNS if not name.startswith(("prompt", "peak_memory"))),
    "fid",
    "lpips",
    "lpips_low",
    "lpips_high",
    *SIZES,
)
TABLE = (
    *(column for column in results.TABLE if column[0] not in ("no decode", "peak MiB")),
    ("FID", "fid", "{:.2f}".format),
    ("LPIPS", "lpips", "{:.3f}".format),
    *(
        (f"{part} M", f"{name}_parameters", lambda count: f"{count / 1e6:.2f}")
        for part, name in (("UNet", "unet"), ("text", "text_encoder"), ("VAE", "vae"))
    ),
    ("disk MB", "bytes_on_disk", lambda count: f"{count / 1e6:.1f}"),
)


def parse_args(argv=None):
    parser = arguments.make_parser(__doc__)
    add = parser.add_argument_group("models").add_argument
    add("--models", nargs="+", default=[str(TINY_SD)], help="pipelines, LoRAs (final/ folders) and folders of images")
    add("--reference", help="what the others are compared with (default: the first of --models)")
    add("--reference_steps", type=arguments.positive_int, help="its steps (default: the most that it takes anyway)")
    add("--pretrained_model_name_or_path", help="pipeline that LoRAs go on (default: the one each was made from)")
    add("--revision", help="revision of hub ids (default: of a LoRA's pipeline, as recorded)")
    add("--variant", help="file variant of the pipelines, such as fp16 (default: of a LoRA's, as recorded)")
    add("--fuse_lora", action="store_true", help="merge LoRAs into the weights: faster, equal up to rounding")
    add = parser.add_argument_group("captions and real images").add_argument
    add("--prompts_file", help="captions: a text file with one a line, or captions.json")
    add("--data_dir", help="captions and real images, in any format that training reads")
    add("--dataset_name", help="the same from a `datasets` set, or 'shapes' for the held-out captions and renders")
    arguments.add_held_out_split(add)
    add("--image_column", help="image column (default: the first that looks like one)")
    add("--caption_column", help="caption column (default: the first that looks like one)")
    add("--caption_template", default="a photo of a {label}", help="caption of a class-label set")
    add("--real_dir", help="folder of real images, without captions")
    add(
        "--num_real_images",
        type=arguments.positive_int,
        help="the first so many real images (default: the split's renders; --real_dir's all; else --num_images)",
    )
    add("--cache_dir", default="outputs/real_features", help="where features of real images are kept")
    add = parser.add_argument_group("sampling").add_argument
    add("--steps", type=arguments.positive_int, nargs="+", help="step counts (default: what each was trained for)")
    add(
        "--trained_steps",
        action="store_true",
        help="--steps is for models that take any count; those that sample "
        "along the steps they were trained for, such as the stages of train_progressive.py, keep theirs",
    )
    add("--num_images", type=arguments.positive_int, help="images per configuration (default: a folder's, else 200)")
    add(
        "--batch_size",
        type=arguments.positive_int,
        help="images per pipeline call (default: 64 at up to 64 pixels a side, 8 at up to 512, 4 above)",
    )
    add("--seed", type=arguments.seed, default=0, help="all noise derives from (seed, caption, image)")
    add("--guidance_scale", type=float, help="of models without guidance baked in (default: what was saved, else 7.5)")
    add("--resolution", type=arguments.positive_int, help="pixels per side (default: each model's own)")
    add = parser.add_argument_group("judges").add_argument
    add("--clip_model", help="CLIP that judges: folder, hub id or 'none' (default: tiny-clip for shapes, else none)")
    add("--reader", help="reader of scenes or of classes: folder or 'none' (default: tiny-reader for shapes)")
    arguments.add_preference_model(add)
    add("--inception_path", help="FID: torch-fidelity's Inception weights, a file or 'download' (default: no FID)")
    add("--lpips_trunk_path", help=f"{arguments.LPIPS_HELP} (default: no LPIPS)")
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", "--outdir", default="outputs/evaluate", help="where results, plots and images go")
    add(
        "--save_images",
        type=arguments.natural,
        help="images saved per configuration, the reference's all where LPIPS needs them "
        "(default: all up to 200, else the first 64)",
    )
    add = parser.add_argument_group("runtime").add_argument
    add("--dtype", choices=("auto", "fp32", "fp16", "bf16"), default="auto", help="auto: fp16 on CUDA, else fp32")
    return parser.parse_args(argv)


@dataclass
class Judges:
    """The networks that judge, None where there is none."""

    clip: object
    reader: object
    preference: object
    inception: object
    lpips: object
    device: object


def check_arguments(args):
    """Refuse, before anything is loaded, what can't work."""
    if sum(map(bool, (args.prompts_file, args.data_dir, args.dataset_name))) > 1:
        raise UsageError("Give one of --prompts_file, --data_dir and --dataset_name.")
    if args.real_dir and (args.data_dir or args.dataset_name not in (None, "shapes")):
        raise UsageError(
            "--real_dir and the data set both have real images: leave one out, or take the captions from "
            "--prompts_file."
        )
    for name in ("num_images", "num_real_images"):
        if getattr(args, name) == 1:
            raise UsageError(f"--{name} 1: statistics need two images at least.")
    if (args.guidance_scale or 0) < 0:
        raise UsageError(f"--guidance_scale {args.guidance_scale:g} is negative.")
    for count in [*(args.steps or []), args.reference_steps or 0]:
        if count > 1000:
            raise UsageError(f"{count} steps are more than the 1000 timesteps of the model.")
    for name in ("inception_path", "lpips_trunk_path"):
        path = getattr(args, name)
        if path not in (None, "download") and not Path(path).is_file():
            raise UsageError(f"--{name} {path}: there is no such file ('download' fetches the weights).")
    cuda = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    if args.dtype == "fp16" and not cuda:
        raise UsageError("--dtype fp16 needs a GPU: use fp32 or bf16.")
    args.dtype = ("fp16" if cuda else "fp32") if args.dtype == "auto" else args.dtype


def load_judges(args, captions, accelerator):
    """The Judges that the flags ask for; a printed line says which are missing. Raises UsageError."""
    device = str(accelerator.device)
    clip, reader = results.load_judges(args.clip_model, args.reader, captions or [""], device)
    preference = results.load_preference_model(args.preference_model, device)
    networks = {"inception": None, "lpips": None}
    loaders = {
        "inception": (metrics.load_inception, args.inception_path, "--inception_path", "FID"),
        "lpips": (metrics.load_lpips, args.lpips_trunk_path, "--lpips_trunk_path", "LPIPS"),
    }
    for name, (load, path, flag, figure) in loaders.items():
        if path is None:
            print(f"No {figure}: {flag} names its weights, or 'download'.", flush=True)
            continue
        with accelerator.main_process_first():  # one downloads
            networks[name] = load(path).to(device)
        networks[name].path = path
    return Judges(clip, reader, preference, **networks, device=device)


def load_model(model, args, device):
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.dtype]
    pipeline = load_pipeline(dtype=dtype, flag="--models", **model.pipeline)
    keep_vae_right(pipeline)
    if model.kind == "lora":
        pipeline.scheduler = saved_scheduler(model.path)
        load_converted(pipeline, model.path, model.pipeline["path"], fuse=args.fuse_lora, flag="--models")
    return pipeline.to(device)


def sizes_of(model, pipeline):
    """SIZES of a loaded model: parameters by part (a LoRA's, unless fused, with the UNet's), bytes of weight files."""
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    text = sum(count for name, count in counts.items() if name.startswith("text_encoder"))
    denoiser = counts["unet" if "unet" in counts else "transformer"]
    sizes = (denoiser, text, counts["vae"], sum(counts.values()), bytes_on_disk(model, parts))
    return dict(zip(SIZES, sizes))


def judge_batch(images, captions, resolution, judges, reference):
    """{name: tensor (B, ...)} of PIL images: features for the main process, and figures that need only the image.

    `captions`: B of them or None; `reference`: files of the images that LPIPS compares with, or None.
    """
    pixels = to_pixels(images, resolution)
    found = {"image": torch.zeros(len(images))}
    if judges.clip:
        found["pooled"] = judges.clip.pooled_features(pixels)
    if judges.inception:
        found["inception"] = metrics.inception_features(judges.inception, pixels)
    if judges.reader:
        read = metrics.read_back(judges.reader, pixels, captions)
        found.update({name: right.float() for name, right in read.items()})
    if judges.preference:
        pooled = judges.preference.pooled_features(pixels)
        found["preference"] = metrics.preference_scores(judges.preference, pooled, captions)
    if judges.lpips:
        others = to_pixels([open_file(file) for file in reference], resolution) if reference else pixels
        with torch.no_grad():
            found["lpips"] = judges.lpips(pixels.to(judges.device), others.to(judges.device)).flatten().cpu()
    return found


def figures_of(gathered, captions, judges, real):
    """Figures of a configuration with intervals, for results.rows_of: on the main process, from all features."""
    per_image = {name: gathered[name] for name in READ if name in gathered}
    if captions and judges.clip:
        per_image.update(metrics.clip_figures(judges.clip, gathered["pooled"], captions))
    figures = {name: metrics.bootstrap_interval(values.double()) for name, values in per_image.items()}
    for name, features in (("frechet", "pooled"), ("fid", "inception")):
        column = "frechet_clip" if name == "frechet" else name
        if column in real:
            figures[name] = metrics.frechet_distance(real[column], gathered[features])
    return {**figures, "per_image": {name: values.tolist() for name, values in per_image.items()}}


def jobs_of(num_images, num_captions):
    """(caption, image of that caption) of every image, captions in order, as equally many of each as there can be."""
    each, more = divmod(num_images, num_captions)
    return [(i, j) for i in range(num_captions) for j in range(each + (i < more))]


def evaluate_model(model, number, args, accelerator, judges, captions, real, reference, done):
    """Judge every configuration of a model, calling `done(rows, entry, scores)` on the main process after each.

    Returns the reference's files: `reference` where there is one, else those of the first configuration.
    """
    jobs = jobs_of(args.num_images, len(captions)) if captions else []
    captions = [captions[i] for i, _ in jobs]
    batch_size = args.batch_size or default_batch_size(model.resolution)
    columns = {"role": "model" if reference else "baseline", "images": args.num_images, "batch_size": batch_size}
    pipeline = None
    if model.kind != "images":
        pipeline = load_model(model, args, accelerator.device)
        columns.update(sizes_of(model, pipeline), guidance_scale=model.guidance_scale)
        saved = pipeline.scheduler
    for steps in model.steps or [None]:
        name, files, timesteps = model.path, model.files, None
        if pipeline:
            pipeline.scheduler = scheduler_for(saved, model.contract, steps)
            timesteps = list_timesteps(pipeline.scheduler, steps)
            guided = f" w={model.guidance_scale:g}" if model.guidance_scale > 1 else ""
            name = f"{model.path} {steps} steps{guided}"
            folder = Path(args.output_dir) / "images" / f"{number}-{slug(name)}"
            files = [folder / f"{k:05d}_{slug(caption)[:40]}.png" for k, caption in enumerate(captions)]
        default = len(files) if len(files) <= NUM_IMAGES else 64
        limit = max(default if args.save_images is None else args.save_images, GRID_IMAGES)
        if judges.lpips and not reference:
            limit = len(files)

        def sample(indices, steps):
            return sample_timed(
                pipeline,
                accelerator.device,
                prompt=[captions[k] for k in indices],
                num_inference_steps=steps,
                guidance_scale=model.guidance_scale,
                height=model.resolution,
                width=model.resolution,
                generator=[sample_generator(args.seed, *jobs[k]) for k in indices],
            )

        warm = set()  # batch sizes that the pipeline has run before it is timed

        def work(indices):
            if not pipeline:
                images, seconds = [open_file(files[k]) for k in indices], {}
            else:
                if len(indices) not in warm:
                    warm.add(len(indices))
                    sample(indices, min(2, steps))
                pixels, without_decode, total = sample(indices, steps)
                images = pipeline.image_processor.postprocess(pixels, output_type="pil")
                each = {"seconds_per_image": total, "seconds_per_image_without_decode": without_decode}
                seconds = {name: torch.full((len(indices),), value / len(indices)) for name, value in each.items()}
                for k, image in zip(indices, images):
                    if k < limit:
                        files[k].parent.mkdir(parents=True, exist_ok=True)
                        image.save(files[k])
            others = [reference[k] for k in indices] if reference else None
            own = [captions[k] for k in indices] if captions else None
            return {**judge_batch(images, own, model.resolution, judges, others), **seconds}

        gathered = sharded(accelerator, args.num_images, batch_size, work, name)
        if accelerator.is_main_process:
            figures = figures_of(gathered, captions, judges, real)
            seconds = {key: values.tolist() for key, values in gathered.items() if key.startswith("seconds")}
            rows = results.rows_of({"configuration": name, **columns, "steps": steps}, figures, seconds, [])
            rows[0] = {key: value for key, value in rows[0].items() if key in COLUMNS and value is not None}
            if "fid" in figures:
                rows[0]["fid"] = figures["fid"]
            done(
                rows,
                {
                    "model": model.path,
                    "kind": model.kind,
                    "resolution": model.resolution,
                    "timesteps": timesteps,
                    "scheduler": type(pipeline.scheduler).__name__ if pipeline else None,
                    "files": list(map(str, files[:limit])),
                },
                figures["per_image"].get("preference"),
            )
        reference = reference or files
        columns["role"] = "model"
    return reference


def write_pictures(output, runs, captions):
    """grid.png, and the plots that these runs give something to draw for."""
    side = (max(entry["resolution"] for _, entry in runs),) * 2
    shown = [[ImageOps.fit(open_file(file), side) for file in entry["files"][:GRID_IMAGES]] for _, entry in runs]
    names = results.short_names([entry["model"] for _, entry in runs])
    heads = [f"{name[-16:]} {rows[0].get('steps', '')}".strip() for name, (rows, _) in zip(names, runs)]
    image_grid([list(row) for row in zip(*shown)], captions, heads).save(output / "grid.png")
    sampled = [{**rows[0], "model": name} for name, (rows, _) in zip(names, runs) if "steps" in rows[0]]
    if len({row["steps"] for row in sampled}) > 1:  # the stages of one distillation are one line
        lines = [{**row, "model": re.sub("(^|/)stage-.*", "", row["model"]) or "stages"} for row in sampled]
        results.plot(lines, "steps", "model", output / "quality_steps.png")
    if len({row["model"] for row in sampled}) > 1:
        results.plot(sampled, "parameters", "steps", output / "quality_size.png")


def main(args):
    check_arguments(args)
    no_gpu = None if torch.accelerator.is_available() else True  # told so, accelerate joins several processes by gloo
    accelerator = Accelerator(cpu=no_gpu)
    if not accelerator.is_main_process:
        sys.stdout = open(os.devnull, "w")  # what holds for all is said once
    models = plan_models(args)
    captions, dataset, drawn = plan_captions(args, models)
    args.num_images = args.num_images or min(NUM_IMAGES, len(captions))
    if args.num_images < 2:
        raise UsageError("There is one caption, and statistics need two images at least: add --num_images.")
    check_captions(captions, models, args.num_images)
    captions = captions and captions[: args.num_images]
    if args.preference_model and not captions:
        raise UsageError("--preference_model needs captions: add --prompts_file, --data_dir or --dataset_name.")
    real = plan_real_images(args, dataset, drawn, models[0].resolution)
    output = Path(args.output_dir)
    for model in models:
        if model.kind == "images" and Path(model.path).resolve().is_relative_to((output / "images").resolve()):
            raise UsageError(f"--models {model.path}: this run writes there; give another --output_dir.")
    results.make_outdir(output, "--output_dir")
    if real:
        results.make_outdir(args.cache_dir, "--cache_dir")
    judges = load_judges(args, captions, accelerator)
    if not any((judges.clip and (captions or real), judges.reader, judges.preference, judges.inception, judges.lpips)):
        if all(model.kind == "images" for model in models):
            raise UsageError(
                "There is nothing to measure: name judges (--clip_model, --inception_path, "
                "--lpips_trunk_path), and captions or real images for them."
            )
    features = {}  # of the real images, on the main process
    if real and judges.clip:
        network = [metrics.fingerprint(judges.clip.model), list(judges.clip.mean), list(judges.clip.std)]
        features["frechet_clip"] = real_features(
            accelerator, args.cache_dir, real, network, judges.clip.pooled_features, "CLIP"
        )
    if real and judges.inception:
        network, of = metrics.fingerprint(judges.inception), partial(metrics.inception_features, judges.inception)
        features["fid"] = real_features(accelerator, args.cache_dir, real, network, of, "Inception")
    for name, kept in features.items():
        if kept is not None and args.num_images <= kept.shape[1]:
            label = "FID" if name == "fid" else "Fréchet (CLIP)"
            print(
                f"Note: {label} fits {kept.shape[1]} dimensions to {args.num_images} images: compare it between "
                "equally many only.",
                flush=True,
            )
    runs, scores, reference = [], [], None  # (rows, entry) of each configuration, and its images' preference
    split = args.held_out_split if drawn else None
    networks = {name: judge for name, judge in vars(judges).items() if name != "device"}
    if accelerator.is_main_process:
        results.begin(output)
    accelerator.wait_for_everyone()

    def done(rows, entry, preferred):
        runs.append((rows, entry))
        scores.append(preferred)
        results.add_ratios([rows for rows, _ in runs])
        results.add_wins([rows for rows, _ in runs], scores)
        device, sources = str(accelerator.device), planning.sources_of(models, [entry["model"] for _, entry in runs])
        report = {
            "manifest": results.manifest(device, args.seed, captions or [], split, networks, sources),
            "processes": accelerator.num_processes,
            "arguments": vars(args),
            "real_images": real and {**real.identity, "count": real.count},
            "configurations": [{**rows[0], **entry} for rows, entry in runs],
        }
        results.write_results(output, [rows for rows, _ in runs], report, COLUMNS)

    try:
        for number, model in enumerate(models):
            reference = evaluate_model(model, number, args, accelerator, judges, captions, features, reference, done)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    except KeyboardInterrupt:
        print(f"\nInterrupted: {output} holds what was finished.", file=sys.stderr, flush=True)
        sys.exit(130)
    except torch.OutOfMemoryError:  # CUDA's
        raise UsageError("Out of GPU memory: lower --batch_size.") from None
    if accelerator.is_main_process:
        jobs = jobs_of(args.num_images, len(captions)) if captions else []
        write_pictures(output, runs, [captions[i] for i, _ in jobs[:GRID_IMAGES]])
        results.print_table([rows for rows, _ in runs], TABLE)
        print(f"results.csv, results.json, grid and plots are in {output}.", flush=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main, parse_args())
