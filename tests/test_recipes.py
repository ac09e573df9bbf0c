"""Every recipe, run with stand-ins for python and accelerate: what it would run passes the scripts' own checks."""

import importlib
import os
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import train_student_kd
from common.contract import TINY_SD
from common.settle import settle

RECIPES = [(path.stem, {}) for path in sorted((ROOT / "recipes").glob("*.sh"))] + [("sd15_student_kd", {"SEED": "1"})]
STAND_IN = """#!/bin/sh
printf '%s\\037' "$@" >> "$CALLS"; echo >> "$CALLS"
echo False
"""


@pytest.fixture
def commands(tmp_path):
    """`commands(recipe, **environment)`: [script and its words, ...] of what the recipe would run."""
    for name in ("python", "accelerate"):
        stand_in = tmp_path / name
        stand_in.write_text(STAND_IN)
        stand_in.chmod(0o755)

    def run(recipe, **environment):
        calls = tmp_path / "calls"
        calls.write_text("")
        environment = {
            **os.environ,
            "CALLS": str(calls),
            "DATA": "data",
            "COCO": "coco",
            "DATA_DIR": "mnist",
            **environment,
        }
        environment["PATH"] = f"{tmp_path}{os.pathsep}{environment['PATH']}"
        subprocess.run(["bash", ROOT / "recipes" / f"{recipe}.sh"], env=environment, check=True, capture_output=True)
        found = []
        for line in calls.read_text().splitlines():
            words = line.split("\037")[:-1]
            scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
            if scripts:
                found.append(words[scripts[0] :])
        return found

    return run


@pytest.mark.parametrize("recipe, environment", RECIPES)
def test_commands_are_accepted(commands, recipe, environment, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # the recipes for GPUs train in fp16
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.syspath_prepend(ROOT / "recipes")  # where a training script that is a recipe's own lies
    # What no recipe needs before it runs: the models of the hub, and students that its own lines make.
    monkeypatch.setattr("common.settle.read_pipeline_config", lambda *_, **__: (None, 512, 8))
    monkeypatch.setattr(train_student_kd, "read_manifest", lambda folder: {"parent": str(TINY_SD)})
    ran = commands(recipe, **environment)
    assert ran
    for script, *words in ran:
        module = importlib.import_module(Path(script).stem)
        args = module.parse_args(words)
        shapes_judged = script == "evaluate.py" and not args.data_dir or getattr(args, "held_out_captions", None)
        if shapes_judged:  # a table's rows: not on what a flag was chosen by
            assert args.held_out_split == "judge"
        if script.startswith("train_"):
            module.check_arguments(args)
            settle(args)
