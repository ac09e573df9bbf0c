"""Results: judges loaded as flags ask, one row per configuration and prompt, and the table as text, CSV and JSON.

A run is what one configuration came to: a list of rows (dicts by column), the one with prompt "all" first, then one
per prompt. A column that a row lacks stays empty.
"""

import csv
import functools
import hashlib
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from tqdm.auto import tqdm

from common import shapes
from common.contract import TINY_SD
from common.data_formats import files_in
from common.errors import UsageError, first_line
from common.judging import metrics

METRICS = ("clip_score", "r_precision", "scene_accuracy", "class_accuracy")
PREFERENCE = ("preference", "preference_win")  # without a share kept: a score of preference has no zero
COLUMNS = (
    "configuration",
    "role",
    "steps",
    "guidance_scale",
    "prompt_index",
    "prompt",
    "images",
    "batch_size",
    "seconds_per_image",
    "seconds_per_image_without_decode",
    "speedup",
    "speedup_without_decode",
    *(f"{name}{suffix}" for name in METRICS for suffix in ("", "_low", "_high", "_retention")),
    *(f"{name}{suffix}" for name in PREFERENCE for suffix in ("", "_low", "_high")),
    "frechet_clip",
    "peak_memory_mib",
    "peak_memory_kind",
)
TABLE = (  # what print_table shows: heading, column, how its value is written
    ("ms/image", "seconds_per_image", lambda seconds: f"{1000 * seconds:.1f}"),
    ("no decode", "seconds_per_image_without_decode", lambda seconds: f"{1000 * seconds:.1f}"),
    ("speed-up", "speedup", "{:.1f}x".format),
    ("no decode", "speedup_without_decode", "{:.1f}x".format),
    ("CLIP", "clip_score", "{:.1f}".format),
    ("kept", "clip_score_retention", "{:.1%}".format),
    ("R-precision", "r_precision", "{:.3f}".format),
    ("kept", "r_precision_retention", "{:.1%}".format),
    ("scene accuracy", "scene_accuracy", "{:.3f}".format),
    ("kept", "scene_accuracy_retention", "{:.1%}".format),
    ("class accuracy", "class_accuracy", "{:.3f}".format),
    ("kept", "class_accuracy_retention", "{:.1%}".format),
    ("preference", "preference", "{:.2f}".format),
    ("preferred", "preference_win", "{:.1%}".format),
    ("Fréchet (CLIP)", "frechet_clip", "{:.2f}".format),
    ("peak MiB", "peak_memory_mib", "{:.0f}".format),
)

QUALITY = {  # what `plot` draws, and which way is better
    "scene_accuracy": "scene accuracy (up)",
    "class_accuracy": "class accuracy (up)",
    "r_precision": "R-precision (up)",
    "clip_score": "CLIP score (up)",
    "preference": "preference (up)",
    "fid": "FID (down)",
    "frechet_clip": "Fréchet (CLIP) (down)",
    "lpips": "LPIPS to the reference (down)",
}


VERSIONS = ("torch", "torchvision", "diffusers", "transformers", "peft", "accelerate")  # of what samples and judges
VERSIONS += ("pillow", "numpy", "torchmetrics", "torch-fidelity", "lpips")

# What inference.py and evaluate.py write.
WRITTEN = ("images", "results.csv", "results.json", "grid.png", "grid_steps.png", "grid_comparison.png")
WRITTEN += ("quality_steps.png", "quality_size.png")


def make_outdir(path, flag="--output_dir"):
    """Make --output_dir. Raises UsageError where it can't be made or written: else that would show hours later."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UsageError(f"{flag} {path} can't be made or written ({error.strerror or error}).") from None


def begin(outdir):
    """Begin the results of a run in `outdir`: those of an earlier one, which they must not mix with, are set aside."""
    outdir = Path(outdir)
    try:
        earlier = "configurations" in json.loads((outdir / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        earlier = False
    if earlier:
        number = next(n for n in itertools.count(1) if not (outdir / f"earlier-{n}").exists())
        aside = outdir / f"earlier-{number}"
        aside.mkdir()
        for name in WRITTEN:
            if (outdir / name).exists():
                os.replace(outdir / name, aside / name)
        print(f"{outdir}: what an earlier run wrote there is now in {aside}.", flush=True)
    write_results(outdir, [], {"configurations": []})


def load_judges(clip_model, reader, captions, device):
    """(ClipJudge, SceneReader) for these captions, each None where there is none; a printed line says why.

    The reader is one of scenes or of classes. `clip_model` and `reader` are those of the flags: a path, "none", or
    None for the default, which may be missing. Raises UsageError where one that was asked for does not load.
    """
    drawn = all(shapes.scene_of(caption) for caption in captions)
    assets, clip_judge, scene_reader = TINY_SD.parent, None, None
    name = clip_model or (str(assets / "tiny-clip") if drawn else "none")
    if name == "none":
        print("No CLIP figures: --clip_model names a judge, such as openai/clip-vit-base-patch32.", flush=True)
    else:
        try:
            clip_judge = metrics.ClipJudge(name, device)
        except ValueError as error:
            if clip_model:
                raise UsageError(f"--clip_model: {error}") from None
            print(f"No CLIP figures: {error}", flush=True)
    name = reader or (str(assets / "tiny-reader") if drawn else "none")
    if name != "none":
        try:
            scene_reader = metrics.SceneReader.from_pretrained(name)
        except Exception:  # whatever the files can have wrong: OSError, ValueError, SafetensorError and others
            if reader:
                raise UsageError(f"--reader {reader}: there is no scene reader or class reader here.") from None
    classes = scene_reader is not None and scene_reader.captions  # that a class reader knows
    if classes:
        if unknown := next((caption for caption in captions if caption not in classes), None):
            print(f"No class accuracy: --reader knows {len(classes)} captions, and not {unknown!r}.", flush=True)
            scene_reader = None
    elif drawn and scene_reader is None:
        print("No scene accuracy: " + ("--reader none." if reader else f"there is no reader in {name}."), flush=True)
    elif scene_reader is not None and not drawn:
        print("No scene accuracy: --reader judges captions of shapes, and not all of these are.", flush=True)
        scene_reader = None
    return clip_judge, scene_reader and scene_reader.to(device)


def load_preference_model(path, device):
    """The ClipJudge of --preference_model, None where there is none. Raises UsageError where it does not load."""
    if path is None:
        return None
    try:
        return metrics.ClipJudge(path, device)
    except ValueError as error:
        raise UsageError(f"--preference_model: {error}") from None


def judged(images, captions, clip_judge, reader, real_features, preference_model=None):
    """judge_images on the pixels that the PNG files hold; without a CLIP the others judge alone."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1
    figures = {"per_image": {}}
    if clip_judge is not None:
        figures = metrics.judge_images(pixels, captions, clip_judge, reader, real_features)
    elif reader is not None:
        right = {name: found.tolist() for name, found in metrics.read_back(reader, pixels, captions).items()}
        figures = {name: metrics.bootstrap_interval(found) for name, found in right.items()} | {"per_image": right}
    if preference_model is not None:
        pooled = preference_model.pooled_features(pixels)
        scores = metrics.preference_scores(preference_model, pooled, captions).tolist()
        figures["preference"] = metrics.bootstrap_interval(scores)
        figures["per_image"]["preference"] = scores
    return figures


def rows_of(columns, figures, measured, prompts):
    """The rows of one configuration, the one of all prompts with the intervals; ratios come in `add_ratios`.

    `columns`: what is alike in every row. `figures`: of `judged`. `measured`: {column: a value for each of N images}.
    Images come prompt by prompt, equally many of each.
    """
    per_image = {name: np.asarray(values, float) for name, values in {**figures["per_image"], **measured}.items()}
    rows = []
    for index, prompt in [("", "all"), *enumerate(prompts)]:
        row = {**columns, "prompt_index": index, "prompt": prompt}
        for name, values in per_image.items():
            chosen = values if index == "" else np.split(values, len(prompts))[index]
            row["images"], row[name] = len(chosen), float(chosen.mean())
        rows.append(row)
    for name in (*METRICS, "preference", "lpips"):
        if name in figures:
            rows[0][name], rows[0][f"{name}_low"], rows[0][f"{name}_high"] = figures[name]
    if "frechet" in figures:
        rows[0]["frechet_clip"] = figures["frechet"]
    return rows


def add_ratios(runs):
    """speedup and _retention of every row, against the row of the same prompt of the run with role "baseline"."""
    baseline = next((rows for rows in runs if rows[0]["role"] == "baseline"), [])
    for rows in runs:
        for row, base in zip(rows, baseline):
            for suffix in ("", "_without_decode"):
                if f"seconds_per_image{suffix}" in base and f"seconds_per_image{suffix}" in row:
                    row[f"speedup{suffix}"] = base[f"seconds_per_image{suffix}"] / row[f"seconds_per_image{suffix}"]
            for name in METRICS:
                if base.get(name):
                    row[f"{name}_retention"] = row[name] / base[name]


def add_wins(runs, scores):
    """preference_win of every run, with its interval: the share of images that are preferred over the baseline's of
    the same caption and noise, a tie as half.

    `scores`: for each run the preference_scores of its images, in the same order, or None.
    """
    baseline = next((own for rows, own in zip(runs, scores) if rows[0]["role"] == "baseline"), None)
    for rows, own in zip(runs, scores):
        if own is not None and baseline is not None:
            own, other = np.asarray(own), np.asarray(baseline)
            interval = metrics.bootstrap_interval((own > other) + (own == other) / 2)
            rows[0].update(zip(("preference_win", "preference_win_low", "preference_win_high"), interval))


def circumstances(device):
    """What figures depend on beside the flags: command, device, threads, versions and the commit; a dict for json."""
    return {
        "command": shlex.join([sys.executable, *sys.argv]),
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in VERSIONS},
        "commit": commit(),
    }


def commit():
    """{"commit", "changed"} of the checkout that this file is of, or None where it is of none.

    changed: whether a file that is kept there differs from the commit's.
    """
    root = Path(__file__).resolve().parents[2]

    def git(*words):
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return None
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):  # no git, no checkout, or somebody else's
        return None


def manifest(device, seed, captions, held_out_split, judges, models):
    """All that the figures of a run depend on, to tell whether two runs measured the same: a dict for results.json.

    captions: what was judged, in order; held_out_split: of shapes.SPLITS, None for other captions;
    judges: {of metrics.RESIZING: ClipJudge or network, with its path, or None}; models: arguments of weights_of, of
    what was sampled or read.
    """
    found = {}
    for name, judge in judges.items():
        if judge is None:
            continue
        known = {"path": "download"} if judge.path == "download" else weights_of(judge.path)
        clip = judge.model if isinstance(judge, metrics.ClipJudge) else None
        if not known.get("sha256"):  # torch.hub's file, or weights that the hub converted
            known["loaded"] = metrics.fingerprint(clip or judge)
        if clip:
            size = clip.config.vision_config.image_size
            known.update(image_size=size, mean=list(judge.mean), std=list(judge.std))
        found[name] = {**known, "resizing": metrics.RESIZING[name]}
    return {
        **circumstances(device),
        "seed": seed,
        "captions": {"count": len(captions), "sha256": _digest(captions), "held_out_split": held_out_split},
        "resizing": "PIL, Lanczos, of the middle square",  # real images, and a folder's, of another size
        "judges": found,
        "models": [weights_of(**source) for source in models],
    }


def weights_of(path, revision=None, variant=None, images=None):
    """{"path", "sha256": {file: hash}} and the rest that is known of a model: the safetensors files at a path or hub
    id. Of a hub id, `revision` becomes the commit that was read. Of a folder of `images` one hash of all of them.
    What can't be read any more is said under "problem": the figures are there, and must not be lost for that."""
    place, hashes, problem = Path(path), {}, None
    try:
        if not place.exists():
            place = Path(snapshot_download(path, revision=revision, local_files_only=True))
            revision = place.name
        files = images or ([place] if place.is_file() else [f for f in files_in(place) if f.suffix == ".safetensors"])
        large = sum(file.stat().st_size for file in files) > 2**30
        for file in tqdm(files, desc=f"sha256 of {path}", unit="file", disable=not large):
            stat = file.stat()
            name = file.name if place.is_file() else file.relative_to(place).as_posix()
            hashes[name] = _sha256(file.resolve(), stat.st_size, stat.st_mtime_ns)
    except (OSError, ValueError) as error:  # ValueError: of a path that is gone, which is no hub id either
        problem = first_line(error)
    if images:
        hashes = {f"{len(hashes)} images": _digest(hashes)}
    known = {"path": str(path), "revision": revision, "variant": variant, "sha256": hashes, "problem": problem}
    return {name: value for name, value in known.items() if value is not None}


def _digest(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


@functools.cache
def _sha256(file, size, time):
    """sha256 of a file's bytes, once for each of its sizes and times."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_results(outdir, runs, report, columns=COLUMNS):
    """results.csv with the rows of all runs and results.json with the report, each replaced in one go."""
    outdir = Path(outdir)
    with open(outdir / ".results.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(row for rows in runs for row in rows)
    os.replace(outdir / ".results.csv", outdir / "results.csv")
    (outdir / ".results.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(outdir / ".results.json", outdir / "results.json")


def print_table(runs, table=TABLE):
    """The "all" rows as aligned text, intervals in brackets; a column that no run has is left out."""

    def shown(row, name, written):
        if name not in row:
            return ""
        low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
        return written(row[name]) + (f" [{written(low)}, {written(high)}]" if low is not None else "")

    lines = [
        [rows[0]["configuration"], *(shown(rows[0], name, written) for _, name, written in table)] for rows in runs
    ]
    columns = [column for column in zip(["configuration", *(head for head, _, _ in table)], *lines) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    for cells in zip(*columns):
        print("  ".join([cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:]))]).rstrip())


def short_names(models):
    """What a picture has room for: the last part of each path that is not "final", or two, or the whole path."""
    parts = [[part for part in Path(model).parts if part != "final"] for model in models]
    for length in (1, 2):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(set(models)):
            return names
    return models


def plot(rows, x, series, path):
    """A picture of every figure of QUALITY against column `x`, a line for each value of column `series`.

    Points are named by their "model" unless that is the series. Nothing is written where nothing was measured.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured = [name for name in QUALITY if any(name in row for row in rows)]
    if not measured:
        return
    size = (4.5 * len(measured), 4)
    figure, axes = plt.subplots(1, len(measured), figsize=size, squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], measured):
        for value in dict.fromkeys(row[series] for row in rows):
            chosen = sorted((row for row in rows if row[series] == value and name in row), key=lambda row: row[x])
            below = [max(row[name] - row.get(f"{name}_low", row[name]), 0) for row in chosen]
            above = [max(row.get(f"{name}_high", row[name]) - row[name], 0) for row in chosen]
            places, heights = [row[x] for row in chosen], [row[name] for row in chosen]
            label = str(value) if series == "model" else f"{value} {series}"
            axis.errorbar(places, heights, [below, above], marker="o", capsize=3, label=label)
            for row in chosen if series != "model" else []:
                axis.annotate(row["model"], (row[x], row[name]), fontsize=7)
        axis.set(xlabel=x, ylabel=QUALITY[name])
        values = [row[name] for row in rows if name in row]
        if name in ("fid", "frechet_clip") and 0 < 10 * min(values) < max(values):
            axis.set_yscale("log")  # a distance without bounds: one failure would flatten all the others
        if x == "steps":  # 512, 256, ... 1
            counts = sorted({row[x] for row in rows})
            axis.set_xscale("log", base=2)
            axis.set_xticks(counts, counts)
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
