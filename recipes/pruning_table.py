"""The table of recipes/tiny_pruning_table.sh, as Markdown, from the reports of its runs and their evaluation."""

import argparse
import json
from pathlib import Path

IMPORTANCES = {"l1": "L1", "taylor": "Taylor", "reconstruction": "reconstruction"}
COLUMNS = [(importance, steps) for importance in IMPORTANCES for steps in (0, 100)]
RATIOS = ("0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the recipe writes")
    return parser.parse_args(argv)


def main(args):
    folder = args.folder
    judged = json.loads((folder / "evaluation" / "results.json").read_text())["configurations"]
    by_name = {Path(row["model"]).parent.name: row for row in judged}

    def accuracy(name):
        row = by_name[name]
        return f"{row['scene_accuracy']:.3f} [{row['scene_accuracy_low']:.3f}, {row['scene_accuracy_high']:.3f}]"

    heads = [f"{IMPORTANCES[name]}, {f'{steps} updates' if steps else 'as it is'}" for name, steps in COLUMNS]
    print("| ratio | UNet parameters left | UNet MACs left | " + " | ".join(heads) + " |")
    print("|---" * (len(heads) + 3) + "|")
    print(f"| 0 | 100 % | 100 % | {accuracy('assets')} " + "| " * len(COLUMNS))
    for ratio in RATIOS:
        report = json.loads((folder / f"l1-{ratio}-0" / "report.json").read_text())
        before, after = (report["components"][name]["unet"] for name in ("tiny-sd", "final"))
        left = [f"{after[key] / before[key]:.1%}" for key in ("parameters", "macs")]
        cells = [ratio, *left, *(accuracy(f"{importance}-{ratio}-{steps}") for importance, steps in COLUMNS)]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(parse_args())
