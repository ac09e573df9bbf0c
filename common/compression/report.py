"""What pruning and quantizing bought, and what it cost: report.json, report.md, a table, a grid and a plot."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from common.compression import calibration, channels
from common.judging import results
from common.judging.previews import image_grid
from common.model_files import weight_files
from common.pipelines import load_pipeline
from common.randomness import sample_generator
from common.sampling import default_batch_size, sample_timed

GRID_IMAGES = 6
TABLE = (  # heading, column, how its value is written
    ("parameters", "parameters", "{:,}".format),
    ("left", "parameters_left", "{:.1%}".format),
    ("MB", "bytes", lambda size: f"{size / 1e6:.2f}"),
    ("as", "dtype", str),
    ("MACs", "macs", lambda macs: f"{macs / 1e9:.3g} G"),
    ("ms/image", "seconds_per_image", lambda seconds: f"{1000 * seconds:.1f}"),
    ("speed-up", "speedup", "{:.2f}x".format),
    ("CLIP", "clip_score", "{:.1f}".format),
    ("scene accuracy", "scene_accuracy", "{:.3f}".format),
    ("kept", "scene_accuracy_retention", "{:.1%}".format),
    ("pixels changed by", "difference", "{:.3f}".format),
)


def judge(run, name, source, captions, judges, contract, counted, original=None):
    """(row, images, {component: {"parameters", "bytes", "macs"}}) of a pipeline as it lies on disk.

    name: in the table; source: of load_pipeline; judges: of results.load_judges; counted: the components that are told
    of one by one. original: images, arrays (H, W, 3) in 0..255, that these are compared with; None: these are the
    original's. With no captions only sizes are taken.
    """
    args, device = run.args, run.device
    steps = contract["steps"] or args.eval_inference_steps
    few = min(steps, 2)  # of one alone PixArt's pipelines think that the model is made for it
    half = torch.float16 if device.type == "cuda" else torch.float32  # CPUs have no fast fp16
    pipeline = load_pipeline(dtype=half if name.endswith("-fp16") else torch.float32, **source).to(device)
    parts = {}
    calls = calibration.record_inputs(
        pipeline,
        counted,
        captions[:1] or ["a photo"],
        [sample_generator(args.seed, 0, 0, stream="report")],
        1,
        num_inference_steps=few,
        guidance_scale=1.0,
        height=args.resolution,
        width=args.resolution,
    )
    for component, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            size = sum(file.stat().st_size for file in weight_files(source, component))
            parts[component] = {"parameters": channels.count(module), "bytes": size}
            if component in counted:
                parts[component]["macs"] = calibration.macs(module, calls[component])
    images, seconds = [], []
    for start in range(0, len(captions), default_batch_size(args.resolution)):
        batch = captions[start : start + default_batch_size(args.resolution)]
        call = {
            "prompt": batch,
            "num_inference_steps": steps,
            "guidance_scale": contract["guidance_scale"],
            "height": args.resolution,
            "width": args.resolution,
            "generator": [sample_generator(args.seed, start + i, 0, stream="report") for i in range(len(batch))],
        }
        if not images:  # not timed: what the first call of a process waits for
            sample_timed(pipeline, device, **{**call, "num_inference_steps": few})
            call["generator"] = [generator.manual_seed(generator.initial_seed()) for generator in call["generator"]]
        pixels, _, took = sample_timed(pipeline, device, **call)
        images += pipeline.image_processor.postprocess(pixels, output_type="pil")
        seconds += [took / len(batch)] * len(batch)
    measured = {}
    if captions:
        arrays = [np.asarray(image, np.float32) for image in images]
        measured["seconds_per_image"] = seconds
        measured["difference"] = [np.abs(a - b).mean() / 255 for a, b in zip(arrays, original or arrays)]
    columns = {
        "configuration": name,
        "dtype": name.removeprefix("final-")
        if name.startswith("final-")
        else dtype_of(weight_files(source, "vae")[0]),
        **{key: sum(part[key] for part in parts.values()) for key in ("parameters", "bytes")},
        **({"macs": sum(part.get("macs", 0) for part in parts.values())} if counted else {}),
    }
    figures = results.judged(images, captions, *judges, None) if captions else {"per_image": {}}
    return results.rows_of(columns, figures, measured, [])[0], images, parts


def dtype_of(file):
    """The dtype of a safetensors file's first tensor, in words."""
    with safe_open(file, "pt") as tensors:
        kind = tensors.get_slice(next(iter(tensors.keys()))).get_dtype()
    return {"F32": "fp32", "F16": "fp16"}.get(kind, kind.lower())


def write_report(run, sources, captions, contract, counted, told):
    """Judge the pipelines of `sources`, the original first, and write report.json, report.md and grid.png.

    told: what else report.json says: {"method": ..., "layers": {component: {group: ...}}, ...}. Prints the table.
    Main process; returns the rows.
    """
    judges = results.load_judges(run.args.clip_model, None, captions, str(run.device)) if captions else None
    rows, pictures, parts = [], [], {}
    for source in sources:
        original = [np.asarray(image, np.float32) for image in pictures[0]] if pictures and captions else None
        name = Path(source["path"]).name
        if not rows and name.startswith("final"):  # as what comes out is called
            name = "/".join(Path(source["path"]).parts[-2:])
        row, images, found = judge(run, name, source, captions, judges, contract, counted, original)
        row["role"] = "model" if rows else "baseline"
        row["parameters_left"] = row["parameters"] / (rows[0] if rows else row)["parameters"]
        rows.append(row)
        pictures.append(images)
        parts[row["configuration"]] = found
    results.add_ratios([[row] for row in rows])
    report = {**results.circumstances(str(run.device)), "rows": rows, "components": parts, **told}
    (run.folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (run.folder / "report.md").write_text(markdown(rows, parts, told, len(captions)))
    if captions:
        shown = list(zip(*(images[:GRID_IMAGES] for images in pictures)))
        heads = [row["configuration"] for row in rows]
        image_grid([list(row) for row in shown], captions[:GRID_IMAGES], heads).save(run.folder / "grid.png")
    results.print_table([[row] for row in rows], TABLE)
    return rows


def markdown(rows, parts, told, count):
    """report.md: what the report says, for people."""
    heads = [(head, key, written) for head, key, written in TABLE if any(key in row for row in rows)]
    lines = [f"# {told['title']}", "", table(["", *(head for head, _, _ in heads)])]
    for row in rows:
        cells = []
        for _, key, written in heads:
            low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
            interval = f" [{written(low)}, {written(high)}]" if low is not None else ""
            cells.append(written(row[key]) + interval if key in row else "")
        lines.append("| " + " | ".join([row["configuration"], *cells]) + " |")
    if count:
        split = told.get("held_out_split")
        judged = f"{count} captions" + (f" of the held-out ones of shapes, split {split!r}" if split else "")
        lines += ["", f"Judged on {judged}; intervals are of 95 %. Time is of one run: compare it within."]
    lines += ["", "## Components", "", table(["", "", "parameters", "MB", "MACs"])]
    for component in next(iter(parts.values())):
        for name, found in parts.items():
            part = found[component]
            macs = f"{part['macs']:,}" if part.get("macs") else ""
            size = f"{part['bytes'] / 1e6:.2f}"
            lines.append(f"| {component} | {name} | {part['parameters']:,} | {size} | {macs} |")
    if whole := [component for component in next(iter(parts.values())) if component not in told["untouched"]]:
        lines += ["", f"Left whole: {', '.join(whole)}."]
    for component, layers in told["layers"].items():
        lines += ["", f"## What went of the {component}", "", table(["layer", "kind", "units", "kept"])]
        for name, layer in layers.items():
            lines.append(f"| {name} | {layer['kind']} | {layer['units']} | {layer['kept']} |")
    for component, share in told["sparsity"].items():
        zeros = sum(share.values()) / max(len(share), 1)
        lines += [
            "",
            f"The {component}: {zeros:.1%} of the weights of {len(share)} layers are zero. Its files are as large",
        ]
        lines += ["as before, and its passes take as long, but on hardware that makes use of 2:4."]
    for component, names in told["untouched"].items():
        lines += ["", f"## Left alone in the {component}", "", ", ".join(names) + "."]
    return "\n".join([*lines, ""])


def table(heads):
    """The first two lines of a Markdown table."""
    return "| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|"


def layers_kept(entry):
    """{group name: {"kind", "units", "kept"}} of a component's entry in the manifest."""
    return {
        name: {"kind": group["kind"], "units": group["units"], "kept": len(group["kept"])}
        for name, group in entry.items()
    }


def plot_sensitivity(errors, path):
    """A picture of error against ratio, a line for each layer, a panel for each component and kind of `errors`,
    {component: {group name: {ratio: relative output error}}}."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(errors), figsize=(8 * len(errors), 5), squeeze=False, layout="constrained")
    for axis, (component, curves) in zip(axes[0], errors.items()):
        for number, (name, curve) in enumerate(curves.items()):
            style = ("-", "--", ":")[number // 10 % 3]
            axis.plot(
                list(map(float, curve)),
                list(curve.values()),
                style,
                marker=".",
                label=name.replace(".transformer_blocks", ""),
            )
        axis.set(title=component, xlabel="share that goes of the layer", ylabel="relative error of the output")
        axis.set_yscale("log")
        axis.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)
