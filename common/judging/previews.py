"""Previews: what the student draws while it trains, as labelled grids."""

import itertools
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from common.conditioning import decode_latents
from common.contract import STEPS
from common.engines import made_whole
from common.frozen import gathered


@torch.no_grad()
def sample_images(pipeline, prompts, scheduler, num_inference_steps, guidance_scale, resolution, seed=0, num_images=1):
    """Images (a list of PIL lists, one per prompt) by the stock pipeline with the given scheduler.

    Image j of every prompt starts from the same noise, seeded by (seed, j). Training is not disturbed: no global
    random number is drawn, and the pipeline keeps its scheduler, dtypes and adapters.
    """
    own_scheduler, pipeline.scheduler = pipeline.scheduler, scheduler
    try:
        with torch.random.fork_rng(devices=[]), gathered(pipeline):
            rows = []
            for prompt in prompts:
                generators = [torch.Generator().manual_seed(seed * 1000 + j) for j in range(num_images)]
                latents = pipeline(
                    [prompt] * num_images,
                    num_inference_steps=num_inference_steps,
                    guidance_scale=guidance_scale,
                    height=resolution,
                    width=resolution,
                    generator=generators,
                    output_type="latent",
                ).images
                with torch.autocast(latents.device.type, enabled=False):  # SDXL's VAE overflows in half precision
                    pixels = decode_latents(pipeline.vae, latents)
                rows.append(pipeline.image_processor.postprocess(pixels, output_type="pil"))
            return rows
    finally:
        pipeline.scheduler = own_scheduler


def preview(run, pipeline, scheduler, contract):
    """samples/step-N.png and the trackers' picture of --validation_prompts, sampled as the contract says.

    By the main process. The pipeline holds the weights that are to be shown, mostly within `ema.applied(parameters)`.
    """
    args = run.args
    with made_whole(run, pipeline):
        if run.accelerator.is_main_process:
            with run.accelerator.autocast():
                rows = sample_images(
                    pipeline,
                    args.validation_prompts,
                    scheduler,
                    contract["steps"] or STEPS,
                    contract["guidance_scale"],
                    args.resolution,
                    args.seed,
                    args.num_validation_images,
                )
            log_images(run.accelerator, run.folder, rows, args.validation_prompts, run.step)
    run.accelerator.wait_for_everyone()


def preview_counts(run, pipeline, scheduler, step_counts):
    """samples/step-N.png at every step count that the student takes, and how much the images of a prompt differ."""
    args, rows, labels = run.args, [], []
    with made_whole(run, pipeline):
        for steps in step_counts if run.accelerator.is_main_process else ():
            count = args.num_validation_images
            with run.accelerator.autocast():
                made = sample_images(
                    pipeline, args.validation_prompts, scheduler, steps, 1.0, args.resolution, args.seed, count
                )
            diversity = image_diversity(made)
            if diversity is not None:
                run.accelerator.log({f"diversity_{steps}_steps": diversity}, step=run.step)
            rows, labels = rows + made, labels + [f"{steps}: {prompt}" for prompt in args.validation_prompts]
    if run.accelerator.is_main_process:
        log_images(run.accelerator, run.folder, rows, labels, run.step)
    run.accelerator.wait_for_everyone()


def image_grid(rows, row_labels=None, column_labels=None, min_side=96):
    """One labelled PIL picture of rows of PIL images; small images are enlarged by a whole factor to be seen."""
    side = max(image.width for row in rows for image in row)
    factor = max(1, -(-min_side // side))
    cell, gap, font = side * factor, 4, ImageFont.load_default(12)
    left = 4 + max((int(font.getlength(_short(label))) for label in row_labels or [""]), default=0)
    top = 20 if column_labels else 0
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (left + columns * (cell + gap), top + len(rows) * (cell + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for x, label in enumerate(column_labels or []):
        draw.text((left + x * (cell + gap) + 2, 4), label, fill="black", font=font)
    for y, row in enumerate(rows):
        if row_labels:
            draw.text((2, top + y * (cell + gap) + cell // 2 - 6), _short(row_labels[y]), fill="black", font=font)
        for x, image in enumerate(row):
            resized = image.resize((image.width * factor, image.height * factor), Image.NEAREST)
            sheet.paste(resized, (left + x * (cell + gap), top + y * (cell + gap)))
    return sheet


def _short(label, limit=60):
    return label if len(label) <= limit else label[: limit - 1] + "…"


def image_difference(image, other, brightness=4):
    """(PIL picture of |image - other|, brightened to be seen; its mean before that, in 0 to 255) of two PIL images.

    (None, None) where their sizes differ.
    """
    if image.size != other.size:
        return None, None
    a, b = (np.asarray(each.convert("RGB"), dtype=np.int16) for each in (image, other))
    distance = np.abs(a - b)
    return Image.fromarray((distance * brightness).clip(0, 255).astype(np.uint8)), float(distance.mean())


def image_diversity(rows):
    """How much the images of one prompt differ: the mean over pairs of their root mean square distance, in [0, 1].

    rows: a list of lists of PIL images. A student that has collapsed comes to 0; None where there are no pairs.
    """
    distances = []
    for row in rows:
        pixels = [np.asarray(image, dtype=np.float32) / 255 for image in row]
        distances += [np.sqrt(np.square(a - b).mean()) for a, b in itertools.combinations(pixels, 2)]
    return float(np.mean(distances)) if distances else None


def log_images(accelerator, folder, rows, prompts, step):
    """Write samples/step-N.png and give the grid to every tracker that takes images. Main process only."""
    grid = image_grid(rows, row_labels=prompts)
    (Path(folder) / "samples").mkdir(exist_ok=True)
    grid.save(Path(folder) / "samples" / f"step-{step}.png")
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image("validation", np.asarray(grid), step, dataformats="HWC")
        elif tracker.name == "wandb":
            import wandb

            tracker.log({"validation": wandb.Image(grid)}, step=step)
