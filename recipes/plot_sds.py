"""What recipes/tiny_sds.sh made, as tables and one picture: guidance against what is right and what differs.

python recipes/plot_sds.py outputs/sds
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.judging.previews import image_diversity  # noqa: E402

SCALES = (1, 4, 10, 30, 100)
IMAGES = 4  # of a prompt, in the sweep


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what tiny_sds.sh wrote into")
    return parser.parse_args(argv)


def of_run(folder):
    """(figures, rows of PIL images, one row a prompt) of a folder of optimize_sds.py."""
    report = json.loads((folder / "final" / "results.json").read_text())
    images = [Image.open(folder / "final" / "images" / f"{name}.png") for name in report["images"]]
    count = report["settings"]["num_images"]
    return report, [images[start : start + count] for start in range(0, len(images), count)]


def of_teacher(folder):
    """The same of a folder of inference.py."""
    (report,) = json.loads((folder / "results.json").read_text())["configurations"]
    images = [Image.open(folder / name) for name in report["files"]]
    rows = [images[start : start + IMAGES] for start in range(0, len(images), IMAGES)]
    values = (report["scene_accuracy"], report["scene_accuracy_low"], report["scene_accuracy_high"])
    return {"scene_accuracy": values, "diversity": image_diversity(rows)}, rows


def line(name, report):
    right = "{:.3f} [{:.3f}, {:.3f}]".format(*report["scene_accuracy"])
    differ = "" if report.get("diversity") is None else f"{report['diversity']:.3f}"
    clip = f"{report['clip_score'][0]:.1f}" if "clip_score" in report else ""
    return f"| {name} | {right} | {clip} | {differ} |"


def main(args):
    print("| | scene accuracy | CLIP | diversity |\n|---|---|---|---|")
    for name in ("sds", "nfsd", "csd", "vsd", "decoder", "encoder", "volume"):
        if (args.folder / name / "final").is_dir():
            print(line(name, of_run(args.folder / name)[0]))
    runs = {scale: of_run(args.folder / f"guidance_{scale}") for scale in SCALES}
    teachers = {scale: of_teacher(args.folder / f"teacher_{scale}") for scale in SCALES}
    for scale in SCALES:
        print(line(f"sds, g = {scale}", runs[scale][0]))
        print(line(f"DDIM, g = {scale}", teachers[scale][0]))

    figure = plt.figure(figsize=(12, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.35, 1))
    axes = left.subplots(1, 2)
    for axis, name, title in zip(
        axes, ("scene_accuracy", "diversity"), ("scene accuracy", "diversity: distance between images of a prompt")
    ):
        for label, found in (("score distillation", runs), ("the teacher's samples, 25 DDIM steps", teachers)):
            values = [found[scale][0][name] for scale in SCALES]
            axis.plot(SCALES, [v[0] if isinstance(v, list | tuple) else v for v in values], marker="o", label=label)
        axis.set_xscale("log")
        axis.set_xticks(SCALES, SCALES)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("guidance scale")
        axis.set_title(title, fontsize=9)
    axes[0].legend(fontsize=8, loc="lower left")
    cells = right.subplots(len(SCALES), 2 * IMAGES)
    for row, scale in zip(cells, SCALES):
        for cell, image in zip(row, [*runs[scale][1][0], *teachers[scale][1][0]]):
            cell.imshow(image)
            cell.set_xticks([])
            cell.set_yticks([])
        row[0].set_ylabel(f"g = {scale}", fontsize=8, rotation=0, ha="right", va="center")
    cells[0][0].set_title("distilled", fontsize=8, loc="left")
    cells[0][IMAGES].set_title("sampled", fontsize=8, loc="left")
    figure.savefig(args.folder / "sds.png", dpi=110)


if __name__ == "__main__":
    main(parse_args())
