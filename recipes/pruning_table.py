"""The table of recipes/tiny_pruning_table.sh, as Markdown, from its runs' report.json."""

import json
import sys
from pathlib import Path

COLUMNS = [(importance, steps) for importance in ("l1", "taylor") for steps in (0, 200)]


def figure(folder, ratio, importance, steps):
    """(parameters of the UNet that are left, MACs that are left, scene accuracy [low, high] as text) of one run."""
    report = json.loads((folder / f"{importance}-{ratio}-{steps}" / "report.json").read_text())
    before, after = (report["components"][name]["unet"] for name in ("tiny-sd", "final"))
    row = report["rows"][1]
    left = [after[key] / before[key] for key in ("parameters", "macs")]
    interval = f"[{row['scene_accuracy_low']:.3f}, {row['scene_accuracy_high']:.3f}]"
    return *left, f"{row['scene_accuracy']:.3f} {interval}"


def main(folder):
    heads = [
        f"{name.replace('l1', 'L1').replace('taylor', 'Taylor')}, {'200 updates' if steps else 'as it is'}"
        for name, steps in COLUMNS
    ]
    print("| ratio | UNet parameters left | UNet MACs left | " + " | ".join(heads) + " |")
    print("|---" * (len(heads) + 3) + "|")
    for ratio in ("0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7"):
        found = [figure(folder, ratio, importance, steps) for importance, steps in COLUMNS]
        print(f"| {ratio} | {found[0][0]:.1%} | {found[0][1]:.1%} | " + " | ".join(text for *_, text in found) + " |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
