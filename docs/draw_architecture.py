"""Draw docs/images/architecture.png: the two floors of the house, a pipeline in, a pipeline out.

    python docs/draw_architecture.py

Fails where a script or a file of common/ is not in the picture, or is drawn but gone.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).resolve().parent.parent
INK, PAPER = "#1f2933", "white"
FLOORS = [  # (title, colour, bottom, height, {room: files}), top to bottom
    (
        "scripts: one file per method; they never import each other",
        "#dbe9f6",
        5.0,
        1.75,
        {
            "make ready": "prepare_unet_small\nprepare_tiny_sd\nprepare_cache",
            "fewer steps": "train_flash_lora\ntrain_lcm\ntrain_progressive\ntrain_add",
            "cheaper, smaller": "train_guided\ntrain_student_kd\ntrain_text_encoder_kd\nprune_and_quantize",
            "use and judge": "inference  evaluate\nexport  app\noptimize_sds",
        },
    ),
    (
        "common/: what a script calls around its loop",
        "#e5f2e3",
        3.2,
        1.73,
        {
            "a run": "settle  preflight\ntrial  run  timing\noutputs  sampling\nparticles  single_file",
            "a small teacher": "teacher_data\nteacher_objectives\npart_training",
            "judging/": "metrics  image_sets\nresults  planning\nevaluation  previews",
            "compression/, of a pipeline": "students  distillation\nplanning  pruning\n"
            "lora_conversion  report\nlora_check  captions",
        },
    ),
    (
        "common/: models, and what is kept of them",
        "#f3efd9",
        1.4,
        1.72,
        {
            "load and predict": "frozen  pipelines\nmodel_files\nconditioning\noriginal_layout",
            "compression/, of a model": "pruned_models\nchannels  calibration\nquantization  manifest\n"
            "quantized_folders",
            "make, adapt": "small_models  lora\nlora_formats\ntext_encoders\ndiscriminators",
            "keep": "contract  schedulers\ncheckpoint  identity\nhooks  parts  stopping\nhub  workflows",
        },
    ),
    (
        "common/: data and mathematics",
        "#f6e3dc",
        -0.38,
        1.7,
        {
            "data": "shapes  texts  images  buckets\nclass_files  data_formats  data\n"
            "shards  shard_index  streams\nremote  loader  cache",
            "mathematics": "diffusion  optimization\nema  randomness\nvolumes  memory",
            "flags, mistakes, processes": "arguments\nerrors\nengines",
        },
    ),
]


def box(axes, x, y, width, height, colour, edge=INK):
    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, fc=colour, ec=edge, lw=1))


def arrow(axes, *points):
    """Along straight lines, its head at the last point."""
    axes.plot(*zip(*points[:-1]), color=INK, lw=1.8, solid_capstyle="butt")
    axes.add_patch(FancyArrowPatch(*points[-2:], arrowstyle="-|>", mutation_scale=18, lw=1.8, color=INK, shrinkA=0))


def write(axes, x, y, text, **style):
    axes.text(x, y, text, **{"va": "top", "size": 10, "color": INK, "linespacing": 1.35, **style})


def floor(axes, title, colour, y, height, rooms):
    box(axes, 2.7, y, 8.6, height, colour, edge="none")
    write(axes, 2.85, y + height - 0.1, title, weight="bold", size=11)
    width = 8.5 / len(rooms)
    for number, (room, files) in enumerate(rooms.items()):
        x = 2.8 + number * width
        box(axes, x, y + 0.1, width - 0.1, height - 0.48, PAPER)
        write(axes, x + 0.1, y + height - 0.57, room, va="baseline", style="italic", color="#52606d")
        for line, names in enumerate(files.split("\n")):
            write(axes, x + 0.1, y + height - 0.82 - 0.21 * line, names, va="baseline", size=9.5, family="monospace")


def pipeline(axes, x, title, lines):
    box(axes, x, 5.0, 2.15, 1.75, "#eceff2")
    write(axes, x + 0.12, 6.65, title, weight="bold", size=11)
    write(axes, x + 0.12, 6.3, "\n".join(lines))


def main():
    drawn = {name for *_, rooms in FLOORS for files in rooms.values() for name in files.split()}
    files = [path.stem for path in [*ROOT.glob("*.py"), *(ROOT / "common").rglob("*.py")] if path.stem != "__init__"]
    assert drawn == set(files), f"drawn or there, but not both: {sorted(drawn ^ set(files))}"
    figure, axes = plt.subplots(figsize=(14, 7.9), dpi=100)
    figure.subplots_adjust(0, 0, 1, 1)
    axes.set(xlim=(0, 14), ylim=(-0.6, 7.5))
    axes.axis("off")
    for each in FLOORS:
        floor(axes, *each)
    pipeline(axes, 0.1, "a pipeline in", ["a folder or a hub id:", "Stable Diffusion 1.x,", "2.x, SDXL, or an output"])
    out = ["a folder that stock", "diffusers opens, or a LoRA:", "weights, scheduler,", "distillation.json, a card"]
    pipeline(axes, 11.75, "a pipeline out", out)
    arrow(axes, (2.25, 5.9), (2.72, 5.9))
    arrow(axes, (11.28, 5.9), (11.75, 5.9))
    arrow(axes, (12.8, 6.75), (12.8, 7.15), (1.2, 7.15), (1.2, 6.73))
    write(axes, 7, 7.45, "an output goes in again: methods compose by passing folders", ha="center")
    arrow(axes, (2.45, 4.9), (2.45, -0.35))
    write(axes, 2.22, 2.6, "imports go down, never up", rotation=90, ha="center", va="center")
    figure.savefig(ROOT / "docs/images/architecture.png")


if __name__ == "__main__":
    main()
