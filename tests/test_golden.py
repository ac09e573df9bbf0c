"""The losses of every method on the embedded default, as they were when the scripts were brought into one shape.

golden_losses.json holds the commands and what they gave on 2026-11-25, before that change; after it every one was the
same bit for bit, with the weights of every checkpoint. Another machine sums in another order: the first loss, which no
update has touched, is compared closely, later ones as far as rounding lets Adam's first steps differ.
"""

import importlib
import json
import shlex
from pathlib import Path

import pytest
from conftest import run_in_process

from common.run import Run

GOLDEN = json.loads((Path(__file__).parent / "golden_losses.json").read_text())


@pytest.mark.parametrize("name", GOLDEN)
def test_losses_are_as_they_were(tmp_path, monkeypatch, name):
    found, count = [], Run.count

    def spy(run, *arguments, **options):
        count(run, *arguments, **options)
        found.append(run.logs["loss"])

    monkeypatch.setattr(Run, "count", spy)
    script, *flags = shlex.split(GOLDEN[name]["command"])
    module = importlib.import_module(script.removesuffix(".py"))
    run_in_process(module, *flags, "--report_to", "none", "--output_dir", tmp_path)
    expected = GOLDEN[name]["losses"]
    assert len(found) == len(expected)
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    assert found == pytest.approx(expected, rel=0.1)
