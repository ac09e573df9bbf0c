"""The losses and gradient norms of every method on the embedded default, as they were when each was written.

golden_losses.json holds the commands and what they gave: those of four steps on 2026-11-25, before the scripts were
brought into one shape, after which every one was the same bit for bit, with the weights of every checkpoint; those of
ten on 2026-11-28, with gradient norms. Another machine sums in another order: the first loss and norm, which no update
has touched, are compared closely, later ones as far as rounding lets Adam's first steps differ.

    python tests/test_golden.py NAME ...        # writes what they give now
"""

import importlib
import json
import shlex
import sys
from pathlib import Path

import pytest
from conftest import run_in_process

from common.run import Run

FILE = Path(__file__).parent / "golden_losses.json"
GOLDEN = json.loads(FILE.read_text())


def figures(command, folder, monkeypatch):
    """{"losses": [...], "grad_norms": [...]} of a run."""
    found, count = {"losses": [], "grad_norms": []}, Run.count

    def spy(run, *arguments, **options):
        count(run, *arguments, **options)
        found["losses"].append(run.logs["loss"])
        found["grad_norms"].append(run.logs["grad_norm"])

    monkeypatch.setattr(Run, "count", spy)
    script, *flags = shlex.split(command)
    module = importlib.import_module(script.removesuffix(".py"))
    run_in_process(module, *flags, "--report_to", "none", "--logging_steps", 1, "--output_dir", folder)
    return found


@pytest.mark.parametrize("name", GOLDEN)
def test_losses_are_as_they_were(tmp_path, monkeypatch, name):
    golden = GOLDEN[name]
    found = figures(golden["command"], tmp_path, monkeypatch)
    for what in golden.keys() - {"command"}:
        assert len(found[what]) == len(golden[what])
        assert found[what][0] == pytest.approx(golden[what][0], rel=1e-4 if what == "losses" else 1e-3)
        assert found[what][:4] == pytest.approx(golden[what][:4], rel=0.1)
        assert found[what][4:] == pytest.approx(golden[what][4:], rel=0.3)


def test_every_script_has_ten():
    long = [golden["command"].split()[0] for golden in GOLDEN.values() if len(golden.get("grad_norms", ())) == 10]
    scripts = {path.name for path in FILE.parent.parent.glob("train_*.py")} | {"prune_and_quantize.py"}
    assert set(long) == scripts


if __name__ == "__main__":
    import tempfile

    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            found = figures(GOLDEN[name]["command"], folder, patch)
        GOLDEN[name].update({what: [float(f"{value:.7g}") for value in values] for what, values in found.items()})
    lines = [f" {json.dumps(name)}: {json.dumps(golden)}" for name, golden in GOLDEN.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
