"""run.sh, with stand-ins for python and accelerate that write what stages would: order, flags, skipping, mistakes."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_in_process
from launching import QUICK, SHAPES

import train_flash_lora
import train_student_kd
import train_text_encoder_kd
from common.compression.lora_check import REPORT
from common.compression.manifest import read_manifest
from common.contract import TINY_SD
from common.settle import settle

CHAIN = [
    "prepare_unet_small.py",
    "train_student_kd.py",
    "train_text_encoder_kd.py",
    "prune_and_quantize.py",
    "train_flash_lora.py",
    "train_flash_lora.py",
    "recipes/train_style_lora.py",
    "recipes/check_loras.py",
    "evaluate.py",
]
STAND_IN = f"""#!{sys.executable}
import json, os, sys
from pathlib import Path

words = sys.argv[1:]
print("False")
script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
if script is not None:
    name, words = words[script], words[script + 1 :]
    with open(os.environ["CALLS"], "a") as calls:
        calls.write("\\037".join([name, *words]) + "\\n")
    value = lambda flag: words[words.index(flag) + 1]
    folder = Path(value("--output_dir"))
    folder.mkdir(parents=True, exist_ok=True)
    if name == "prepare_unet_small.py" or "--pretrained_model_name_or_path" in words:
        parent = str(Path(value("--pretrained_model_name_or_path")).absolute())
    if "flash" in name:
        folder = folder / "lora"
    made = [f"final-{{kind}}" for kind in ("fp16", "int8") if "--export" in words and kind in words]
    for final in [""] if name == "prepare_unet_small.py" else ["final", *made] if "--max_steps" in words else made:
        (folder / final).mkdir(parents=True, exist_ok=True)
        if "style" not in name:
            contract = {{"guidance": "cfg", "guidance_scale": 2.0, "parent": parent}}
            (folder / final / "distillation.json").write_text(json.dumps(contract))
    if name == "prune_and_quantize.py":
        (folder / "final").mkdir(exist_ok=True)
        (folder / "final" / "distillation.json").write_text(json.dumps(contract))
        (folder / "report.json").touch()
    if "check_loras" in name:
        (folder / "{REPORT}").touch()
"""


@pytest.fixture
def run(tmp_path):
    """`run(**variables)`: ([[script, word, ...], ...] of what run.sh ran, the process), in tmp_path.

    It may be called again.
    """
    stand_ins = tmp_path / "stand-ins"
    stand_ins.mkdir()
    for name in ("python", "accelerate"):
        (stand_ins / name).write_text(STAND_IN)
        (stand_ins / name).chmod(0o755)
    for name in ("run.sh", "recipes", "assets", "accelerate_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "setup.sh").write_text("")

    def run(*words, **variables):
        calls = tmp_path / "calls"
        calls.write_text("")
        path = f"{stand_ins}{os.pathsep}{os.environ['PATH']}"
        environment = {"PATH": path, "CALLS": str(calls), "HOME": str(tmp_path), "STUDENT": "sd_base", **variables}
        ran = subprocess.run(
            ["bash", tmp_path / "run.sh", *words], env=environment, capture_output=True, text=True, timeout=60
        )
        return [line.split("\037") for line in calls.read_text().splitlines()], ran

    return run


def scripts(calls):
    return [script for script, *_ in calls]


def flag(calls, script, name):
    """What `name` is in the first call of `script`."""
    words = next(call for call in calls if call[0] == script)
    return words[words.index(name) + 1]


@pytest.mark.parametrize("variables", [{}, {"FULL": "1"}, {"BASE": "some/pipeline", "DATA_DIR": "assets"}])
def test_commands_are_accepted(run, variables, tmp_path, monkeypatch):
    calls, ran = run(**variables)
    assert ran.returncode == 0, ran.stderr
    expected = CHAIN
    if "BASE" in variables:  # there is no LoRA of ours for a pipeline of one's own
        expected = [script for script in CHAIN if not script.startswith("recipes/")]
        assert "no LoRA in output/test_loras" in ran.stdout
    assert scripts(calls) == expected
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "recipes")
    monkeypatch.setattr("common.settle.read_pipeline_config", lambda *_, **__: (None, 512, 8))
    monkeypatch.setattr(train_student_kd, "read_manifest", lambda folder: {"parent": str(TINY_SD)})
    for script, *words in calls:
        module = importlib.import_module(Path(script).stem)
        args = module.parse_args(words)
        if hasattr(module, "check_arguments"):
            module.check_arguments(args)
        if script.split("/")[-1].startswith(("train_", "prune_")):
            settle(args, transformers=True)


def test_outputs_lie_as_in_the_tree(run, tmp_path):
    run()
    output = tmp_path / "output"
    for name, made in [
        ("distilled", "text_encoder/final"),
        ("pruned", "prune/final"),
        ("quant", "lora/lora/final-int8"),
    ]:
        assert (output / name).resolve() == output / "runs" / made and (output / name).is_dir()
    assert (output / REPORT).is_file() and len(list((output / "test_loras").iterdir())) == 1


def test_each_stage_goes_on_from_the_last_that_was_made(run):
    calls, _ = run()
    models = [words[words.index("--pretrained_model_name_or_path") + 1] for _, *words in calls[1:6]]
    runs = "output/runs"
    made = [f"{runs}/kd/final", f"{runs}/text_encoder/final", f"{runs}/prune/final", f"{runs}/prune/final"]
    assert models == ["assets/tiny-sd", *made]
    assert calls[1][calls[1].index("--student_model") + 1] == f"{runs}/student"
    assert [word for word in calls[-1] if word.startswith("output/")] == [
        *(f"output/fp16/{name}" for name in ("student", "distilled", "pruned", "few_step")),
        "output/quant",
        "output/evaluation",
    ]


def test_without_a_student_the_blocks_stay(run):
    calls, _ = run(STUDENT="none", OUTPUT_DIR="elsewhere")
    assert scripts(calls) == CHAIN[2:]
    assert flag(calls, "train_text_encoder_kd.py", "--pretrained_model_name_or_path") == "assets/tiny-sd"
    assert flag(calls, "train_text_encoder_kd.py", "--output_dir") == "elsewhere/runs/text_encoder"


def test_stages_picks_and_what_is_left_out_is_passed_over(run):
    calls, _ = run(STAGES="student kd prune")
    assert scripts(calls) == [CHAIN[0], CHAIN[1], CHAIN[3]]
    assert flag(calls, "prune_and_quantize.py", "--pretrained_model_name_or_path") == "output/runs/kd/final"


def test_what_is_complete_is_skipped_and_what_is_not_is_resumed(run, tmp_path):
    run()
    calls, ran = run()
    assert scripts(calls) == ["evaluate.py"] and "== prune: output/runs/prune/report.json is complete." in ran.stdout
    (tmp_path / "output/runs/prune/report.json").unlink()
    calls, _ = run()
    assert scripts(calls) == ["prune_and_quantize.py", "evaluate.py"]
    assert flag(calls, "prune_and_quantize.py", "--resume_from_checkpoint") == "latest"
    shutil.rmtree(tmp_path / "output/runs/lora/lora/final-int8")
    calls, _ = run(STAGES="lora quant")
    assert scripts(calls) == ["train_flash_lora.py"] and "int8" in calls[0]


def test_own_loras_are_checked_instead_of_ours(run, tmp_path):
    (tmp_path / "output/test_loras").mkdir(parents=True)
    (tmp_path / "output/test_loras/mine.safetensors").touch()
    calls, _ = run()
    assert scripts(calls) == [script for script in CHAIN if "style" not in script]


def test_variables_reach_the_flags(run):
    calls, ran = run(
        STUDENT="sd_tiny",
        STEPS="11",
        CLIP_DISTILL_STEPS="12",
        RECOVER_STEPS="13",
        LORA_STEPS="14",
        LR="3e-4",
        PRUNE_RATIO="0.15",
        TEXT_ENCODER_PRUNE_RATIO=".1",
        VAE_PRUNE_RATIO="0",
        FEW_STEPS="3",
        DATA_DIR="assets",
        CAPTIONS="16",
    )
    assert ran.returncode == 0, ran.stderr
    for script, name, value in [
        ("prepare_unet_small.py", "--student_variant", "sd_tiny"),
        ("train_student_kd.py", "--max_steps", "11"),
        ("train_student_kd.py", "--learning_rate", "3e-4"),
        ("train_text_encoder_kd.py", "--max_steps", "12"),
        ("train_text_encoder_kd.py", "--learning_rate", "3e-4"),
        ("prune_and_quantize.py", "--finetune_steps", "13"),
        ("prune_and_quantize.py", "--unet_prune_ratio", "0.15"),
        ("prune_and_quantize.py", "--text_encoder_prune_ratio", ".1"),
        ("prune_and_quantize.py", "--vae_prune_ratio", "0"),
        ("train_flash_lora.py", "--max_steps", "14"),
        ("train_flash_lora.py", "--num_inference_steps", "3"),
        ("train_flash_lora.py", "--data_dir", "assets"),
        ("evaluate.py", "--num_images", "16"),
        ("evaluate.py", "--data_dir", "assets"),
    ]:
        assert flag(calls, script, name) == value, (script, name)


@pytest.mark.parametrize(
    "variables, said",
    [
        ({"BASE": "tiny-sd"}, "BASE=tiny-sd is neither the folder of a pipeline nor the name of one on the hub"),
        ({"BASE": "sd_small"}, "say STUDENT=sd_small"),
        ({"BASE": "some/pipeline"}, "BASE=some/pipeline needs DATA_DIR"),
        ({"STUDENT": "small"}, "STUDENT=small is none of sd_base, sd_small, sd_tiny and none"),
        ({"STAGES": "kd pruning"}, "there is no stage pruning; there are: student kd"),
        ({"DATA_DIR": "nowhere"}, "DATA_DIR=nowhere: there is no such folder"),
        ({"STEPS": "many"}, "STEPS=many is not a whole number from 1 on"),
        ({"PRUNE_RATIO": "1"}, "PRUNE_RATIO=1 is not in [0, 1)"),
        ({"VAE_PRUNE_RATIO": "-0.1"}, "VAE_PRUNE_RATIO=-0.1 is not in [0, 1)"),
        ({"LR": "fast"}, "LR=fast is not a number"),
        ({"STAGES": "kd"}, "add student to STAGES"),
        ({"STAGES": "quant"}, "add lora to STAGES"),
        ({"STAGES": "check"}, "add quant to STAGES"),
    ],
)
def test_mistakes_get_a_sentence(run, variables, said):
    calls, ran = run(**variables)
    assert not calls and ran.returncode == 2
    assert ran.stderr.startswith("run.sh: ") and said in ran.stderr and len(ran.stderr.splitlines()) == 1


def test_arguments_and_other_settings_are_refused(run):
    calls, ran = run("--steps", "3")
    assert not calls and "no arguments" in ran.stderr
    run(STAGES="student")
    calls, ran = run(STEPS="7", LR="1e-4")
    assert not calls and ran.returncode == 2
    assert "output was begun with other settings; now STEPS=7 LR=1e-4: give another OUTPUT_DIR" in ran.stderr
    calls, _ = run(STEPS="7", OUTPUT_DIR="other", STAGES="student")
    assert scripts(calls) == ["prepare_unet_small.py"]


def test_what_blocks_became_is_carried_to_the_end(pipelines, students, tmp_path):
    """A LoRA for the original is placed right on what a smaller text encoder, and then a merged LoRA, was put into."""
    student = students(variant="sd_small")
    for script, folder, flags in [
        (train_text_encoder_kd, "text", ["--num_hidden_layers", 1]),
        (train_flash_lora, "lora", ["--num_ddim_steps", 1, "--export", "fp16"]),
    ]:
        model = student if folder == "text" else tmp_path / "text" / "final"
        arguments = [*QUICK, *SHAPES, "--pretrained_model_name_or_path", model, "--max_steps", 1]
        run_in_process(script, *arguments, "--output_dir", tmp_path / folder, *flags)
    assert (block_map := read_manifest(student)["block_map"])
    for folder in ("text/final", "lora/lora/final-fp16"):
        assert read_manifest(tmp_path / folder)["block_map"] == block_map
