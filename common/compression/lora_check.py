"""What LoRAs do on a compressed model: whether each loads, fuses and unfuses, and how it changes the images.

The style of a LoRA is what it adds to the images of one prompt and noise. On a compressed model that should be what it
adds on the original: the cosine between the two differences says how far it is.
"""

import json
from pathlib import Path

import numpy as np
import torch

from common.compression.lora_conversion import adapted_layers, attach, converted, dequantize_adapted, is_quantized
from common.errors import UsageError, first_line
from common.judging.previews import sample_images
from common.lora import WEIGHTS

REPORT = "lora_compatibility_report.json"
NAME = "checked"  # of the adapter
TOLERANCE = 1 / 255  # mean absolute difference of pixels in [0, 1] that fusing may make, or a tenth of the LoRA's own
TABLE = (  # for results.print_table
    ("fitting", "fitting", str),
    ("converted", "converted", str),
    ("dropped", "dropped", str),
    ("parameters", "coverage", "{:.1%}".format),
    ("loads", "loads", str),
    ("fuses", "fuses", str),
    ("unfuses", "unfuses", str),
    ("changes pixels by", "image_difference", "{:.4f}".format),
    ("style cosine", "style_cosine", "{:.3f}".format),
    ("error", "error", str),
)


def lora_files(folder, flag="--lora_dir"):
    """{name: path} of the LoRAs in a folder: .safetensors files, and folders as the training scripts write them.

    Raises UsageError where there is none, or one is a pickle.
    """
    if not Path(folder).is_dir():
        raise UsageError(f"{flag} {folder}: there is no such folder.")
    found, entries = {}, sorted(Path(folder).iterdir())
    for path in [Path(folder) / WEIGHTS] if (Path(folder) / WEIGHTS).is_file() else entries:
        if path.suffix in (".bin", ".ckpt", ".pt", ".pth", ".pkl"):
            raise UsageError(f"{flag} {folder}: {path.name} is a pickle, and only .safetensors files are loaded.")
        if path.suffix == ".safetensors" and path.is_file():
            found[path.stem if path.name != WEIGHTS else Path(folder).resolve().name] = path
        for inner in (path, path / "final"):
            if (inner / WEIGHTS).is_file():
                found[path.name] = inner
    if not found:
        raise UsageError(
            f"{flag} {folder}: the folder holds no LoRA (a .safetensors file, or a folder with {WEIGHTS})."
        )
    return found


def check_loras(
    pipeline,
    folder,
    manifest,
    prompts,
    steps=25,
    guidance_scale=7.5,
    resolution=None,
    seed=0,
    teacher=None,
    output=None,
    teacher_sampling=None,
):
    """{name: entry} of every LoRA in `folder` on a compressed pipeline, one image of each prompt; the pipeline is as
    it was afterwards.

    manifest: compression.json of the pipeline. entry: fitting (layers), converted and dropped ([{layer, why}, ...]),
    coverage {layers, parameters}, loads, fuses, unfuses, image_difference (mean absolute difference of pixels in
    [0, 1], with and without), style_cosine (with `teacher`, the original pipeline), error (a sentence or None).
    output: folder for lora_compatibility_report.json. teacher_sampling: (steps, guidance scale) of the teacher, where
    they are others. Raises UsageError where there is no LoRA to check.
    """

    def sample(pipeline):
        sampling = teacher_sampling if teacher_sampling and pipeline is teacher else (steps, guidance_scale)
        return pixels_of(pipeline, prompts, *sampling, resolution, seed)

    without, report, original = sample(pipeline), {}, sample(teacher) if teacher else None
    for name, path in lora_files(folder).items():
        report[name] = entry = check_lora(pipeline, path, manifest, without, sample)
        difference = entry.pop("difference", None)
        if teacher and difference is not None:
            try:
                changed = check_lora(teacher, path, {}, original, sample, fuse=False)["difference"]
                entry["style_cosine"] = style_cosine(changed, difference)
            except KeyError:
                entry["error"] = "it does not load on the original"
    if output:
        (Path(output) / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    return report


def check_lora(pipeline, path, manifest, without, sample, fuse=True):
    """The entry of one LoRA, with the array `difference` where it loads; see check_loras.

    without: sample(pipeline) as it is, (images, H, W, 3) in [0, 1]. fuse: whether it is fused and unfused too.
    """
    entry = {"fitting": 0, "converted": [], "dropped": [], "coverage": {"layers": 0.0, "parameters": 0.0}}
    entry |= {"loads": False, "fuses": False, "unfuses": False, "image_difference": None, "error": None}
    before = []
    try:
        layers, report = converted(pipeline, path, manifest, "LoRA")
        entry.update(report)
        attach(pipeline, layers, NAME)
        given = sample(pipeline)
        entry["loads"], entry["difference"] = bool(np.isfinite(given).all()), given - without
        entry["image_difference"] = float(np.abs(given - without).mean())
        if fuse:
            tolerance = max(TOLERANCE, entry["image_difference"] / 10)
            before = [(layer, weight_of(layer)) for layer in adapted_layers(pipeline)]
            dequantize_adapted(pipeline)
            pipeline.fuse_lora()
            fused = NAME in pipeline.fused_loras
            entry["fuses"] = fused and bool(np.abs(sample(pipeline) - given).mean() <= tolerance)
            pipeline.unfuse_lora()
            pipeline.disable_lora()
            entry["unfuses"] = bool(np.abs(sample(pipeline) - without).mean() <= tolerance)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        entry["error"] = first_line(error)
    finally:
        if NAME in pipeline.fused_loras:
            pipeline.unfuse_lora()
        for layer, weight in before:  # exactly: what was added and taken off again is rounded
            layer.weight = weight
        pipeline.unload_lora_weights()
    return entry


def weight_of(layer):
    """Its weight, to be put back: a copy, except of a quantized one, which fusing replaces as a whole."""
    return layer.weight if is_quantized(layer) else torch.nn.Parameter(layer.weight.detach().clone(), False)


def pixels_of(pipeline, prompts, steps, guidance_scale, resolution=None, seed=0):
    """One image of each prompt from the pipeline's own scheduler: (images, H, W, 3) in [0, 1], fp64."""
    resolution = resolution or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    rows = sample_images(pipeline, prompts, pipeline.scheduler, steps, guidance_scale, resolution, seed)
    return np.stack([np.asarray(image, dtype=np.float64) / 255 for (image,) in rows])


def style_cosine(changed, difference):
    """Mean over images of the cosine between what a LoRA adds on two models, (images, H, W, 3) each, in [-1, 1]."""
    a, b = (x.reshape(len(x), -1) for x in (changed, difference))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.mean((a * b).sum(1) / np.maximum(norms, 1e-12)))


def rows_of(report):
    """Rows for results.print_table(rows, TABLE): counts in place of lists."""
    rows = []
    for name, entry in report.items():
        row = {**entry, "configuration": name, "coverage": entry["coverage"]["parameters"]}
        row |= {key: len(entry[key]) for key in ("converted", "dropped")}
        rows.append([{key: value for key, value in row.items() if value is not None}])
    return rows
