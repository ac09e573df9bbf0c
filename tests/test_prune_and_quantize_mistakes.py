"""prune_and_quantize.py: what can't work is one sentence before any model loads; a full disk leaves nothing half."""

import errno
import shutil
from pathlib import Path

import pytest
import torch
from conftest import random_pipeline
from diffusers import StableDiffusionPipeline
from launching import assert_every_flag_has_help, error_of, quick
from random_transformers import random_transformer_pipeline
from safetensors import SafetensorError
from safetensors.torch import save_file
from test_prune_and_quantize import FEW

import prepare_unet_small
import prune_and_quantize
from common.compression import channels
from common.compression.manifest import write_manifest
from common.compression.quantization import quantize_pipeline
from common.compression.students import student_config
from common.errors import ModelError

PACKED = "svdq-int4_r32-flux.1-dev.safetensors"
RECOVERY = ["--finetune_steps", 1]
MISTAKES = [  # kind of pipeline, flags, what is said
    ("sd", ["--transformer_prune_ratio", 0.5], "--transformer_prune_ratio: {model} has no transformer."),
    ("flux", ["--unet_prune_ratio", 0.5], "--unet_prune_ratio: {model} has no unet."),
    ("pixart", ["--text_encoder_prune_ratio", 0.5], "--text_encoder_prune_ratio: the text_encoder of {model} has no"),
    ("pixart", ["--eval_inference_steps", 1], "--eval_inference_steps 1: PixArt's pipelines need 2 steps"),
    ("flux", ["--method", "width"], "--method width: {model} has no UNet."),
    ("flux", ["--lora_dir", "{good}"], "--lora_dir: LoRAs are checked on pipelines with a UNet"),
    ("flux", RECOVERY, "--finetune_steps: a pipeline without a UNet"),
    ("sd", ["--unet_prune_ratio", 0.99], "--unet_prune_ratio 0.99 leaves nothing of "),
    ("sd", ["--vae_prune_ratio", 0.99], "--vae_prune_ratio 0.99 leaves nothing of "),
    ("sd", ["--conv_ratio", 0.99], "--conv_ratio 0.99 leaves nothing of "),
    ("sd", ["--attention_ratio", 0.8], "--attention_ratio 0.8 leaves nothing of "),
    ("sd", ["--method", "heads", "--vae_prune_ratio", 0.5], "--vae_prune_ratio: the vae of {model} has no attention"),
    ("sd", ["--method", "magnitude", "--conv_ratio", 0.5], "--conv_ratio is about --method structured and heads"),
    ("sd", ["--method", "width", "--vae_prune_ratio", 0.5], "--vae_prune_ratio: --method width"),
    ("sd", ["--method", "width", "--iterative", 2, *RECOVERY], "--iterative: --method width"),
    ("sd", ["--iterative", 2], "--iterative 2: its rounds need --finetune_steps"),
    ("sd", ["--pattern", "2:4"], "--pattern 2:4 is about --method magnitude"),
    ("sd", ["--method", "magnitude", "--sensitivity"], "--sensitivity and targets are about"),
    ("sd", ["--target_bytes", "60%", "--target_parameters", "60%"], "give one of them"),
    ("sd", ["--target_parameters", "10%"], "at most"),
    ("sd", ["--target_bytes", "10K"], "--target_bytes: of 372,643 parameters in"),
    ("sd", ["--target_parameters", "600M"], "which is no more than that"),
    ("sd", ["--target_bytes", "100%"], "which is no more than that"),
    ("sd", ["--int8_skip", 2], "--int8_skip and --int8_backend are about --export int8"),
    ("sd", ["--lora_dir", "{folder}/nowhere"], "--lora_dir {folder}/nowhere: there is no such folder"),
    ("sd", ["--lora_dir", "{folder}/loras"], "old.ckpt is a pickle, and only .safetensors"),
    ("sd", ["--calibration_prompts", "{folder}/none.txt"], "--calibration_prompts {folder}/none.txt can't be read"),
    ("sd", ["--dataset_name", "shapes", "--num_eval_images", 501], "--num_eval_images 501: there are 500 held-out"),
    ("int8", [], "its weights are quantized, INT8 (torchao), and can't be pruned"),
    ("packed", [], "its weights are packed in 4 bits (svdquant), so nothing of it can be cut"),
    (PACKED, [], "start from the unquantized model, black-forest-labs/FLUX.1-dev,"),
    ("sd", ["--fp8_activations"], "--fp8_activations is about --export fp8: add it"),
    (
        "sd",
        ["--precision", "fp8", "--fp8_activations"],
        "--fp8_activations needs a CUDA GPU of compute capability 8.9",
    ),
    ("sd", ["--importance", "reconstruction", "--no_compensation"], "leave out --no_compensation"),
    ("pickle.bin", [], "it is a pickle, which is never opened"),
    ("pickle.ckpt", [], "it is a pickle, which is never opened"),
]


@pytest.fixture(scope="module")
def models(pipelines, tmp_path_factory):
    """{kind: folder or file} of what MISTAKES name."""
    folder = tmp_path_factory.mktemp("mistakes")
    found = {kind: folder / kind for kind in ("flux", "pixart", "int8", "packed", "pickle.bin", "pickle.ckpt")}
    for kind in ("flux", "pixart"):
        random_transformer_pipeline(kind).save_pretrained(found[kind])
    pipeline = random_pipeline("sd")
    quantize_pipeline(pipeline)
    pipeline.save_pretrained(found["int8"])
    shutil.copytree(pipelines(), found["packed"])
    packed = {"blocks.0.qkv.qweight": torch.zeros(2, 2, dtype=torch.int8), "blocks.0.qkv.wscales": torch.zeros(2)}
    save_file(packed, found["packed"] / "unet" / "diffusion_pytorch_model.safetensors")
    found[PACKED] = folder / PACKED
    save_file(packed, found[PACKED])
    for name in ("pickle.bin", "pickle.ckpt"):
        torch.save({"weight": torch.zeros(2)}, found[name])
    (folder / "loras").mkdir()
    torch.save({"lora": torch.zeros(2)}, folder / "loras" / "old.ckpt")
    (folder / "good").mkdir()
    save_file({"lora": torch.zeros(2)}, folder / "good" / "style.safetensors")
    return {"sd": Path(pipelines()), "folder": folder, "good": folder / "good", **found}


@pytest.mark.parametrize("kind, wrong, said", MISTAKES, ids=[f"{k} {' '.join(map(str, w))}" for k, w, _ in MISTAKES])
def test_mistakes_are_one_sentence_before_a_model_loads(models, tmp_path, capsys, monkeypatch, kind, wrong, said):
    def loaded(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(prune_and_quantize, "load_pipeline", loaded)
    monkeypatch.setattr("common.compression.quantized_folders.capability", lambda: (8, 6))
    wrong = [str(word).format(**models) for word in wrong]
    arguments = quick(lambda _: str(models[kind]), tmp_path / "out", *FEW, *wrong)
    error = error_of(prune_and_quantize, arguments, capsys)
    assert error.startswith("error: ") and said.format(**models, model=models[kind]) in error, error
    assert error.count("\n") == 1 and error.rstrip().endswith("."), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--unet_prune_ratio", "--text_encoder_prune_ratio", "--attention_ratio"])
@pytest.mark.parametrize("value", ["1", "-0.1", "nan"])
def test_ratios_outside_0_and_1_are_no_ratios(capsys, flag, value):
    with pytest.raises(SystemExit) as stop:
        prune_and_quantize.parse_args([flag, value])
    assert stop.value.code == 2 and f"argument {flag}: {value} is not in [0, 1)" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0%", "101%", "many", "1.2.3", "-5"])
def test_targets_that_are_no_amounts(capsys, value):
    with pytest.raises(SystemExit):
        prune_and_quantize.parse_args([f"--target_bytes={value}"])
    assert f"{value} is neither a percentage" in capsys.readouterr().err


def test_widths_of_a_pruned_unet_are_not_changed(tmp_path, capsys):
    pipeline = random_pipeline("sd")
    group = next(group for group in channels.groups_of(pipeline.unet) if group.kind == "conv")
    channels.prune(pipeline.unet, {group.name: [0, 1, 2]})
    pipeline.save_pretrained(tmp_path / "pruned")
    write_manifest(tmp_path / "pruned", {"feature_pairs": []})
    for cut in (["--width_ratio", 0.5], ["--student_variant", "sd_base"], ["--width_ratio", 0.5, "--dry_run"]):
        arguments = ["--pretrained_model_name_or_path", tmp_path / "pruned", "--output_dir", tmp_path / "out", *cut]
        error = error_of(prepare_unet_small, arguments, capsys)
        assert error.startswith("error: the UNet's layers were pruned to widths of their own")
        assert error.count("\n") == 1
    with pytest.raises(ModelError, match="start from what it was made of"):
        student_config(pipeline.unet.config, "sd_base")


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device", "diffusion_pytorch_model.safetensors"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["OSError", "SafetensorError"],
)
def test_a_full_disk_is_a_sentence_and_leaves_nothing_half(pipelines, tmp_path, capsys, monkeypatch, failure):
    save = StableDiffusionPipeline.save_pretrained

    def until_full(pipeline, folder, *given, **options):
        save(pipeline, folder, *given, **options)
        raise failure

    more = ["--vae_prune_ratio", 0.5, "--importance", "l1", "--no_compensation"]
    arguments = quick(pipelines, tmp_path, *FEW, *more)
    monkeypatch.setattr(StableDiffusionPipeline, "save_pretrained", until_full)
    error = error_of(prune_and_quantize, arguments, capsys)
    said = error[error.rindex("error: ") :]
    assert "No space left on device" in said and said.count("\n") == 1 and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_every_flag_has_help_and_the_rates_are_told(monkeypatch, capsys):
    assert_every_flag_has_help(prune_and_quantize, monkeypatch)
    with pytest.raises(SystemExit):
        prune_and_quantize.parse_args(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "attention 0.3 to 0.4, 0.5 to 0.6; feed-forward 0.4 to 0.5, 0.6 to 0.7" in said
    assert "convolutions 0.5 to 0.6, 0.7 to 0.8" in said and "T5 is left whole" in said
