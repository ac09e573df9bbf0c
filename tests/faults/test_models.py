"""Models and LoRAs from anywhere: whole, or a sentence that names file and key before anything trains."""

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import read_json, run_in_process, save_random_lora
from diffusers import DiffusionPipeline, UNet2DConditionModel
from launching import each, error_of, flags, quick, see_with
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

import evaluate
import inference
import prepare_unet_small
import train_add
import train_flash_lora
import train_guided
from common.pipelines import load_pipeline


def edit(file, **changes):
    config = {key: value for key, value in {**read_json(file), **changes}.items() if value != "DROP"}
    file.write_text(json.dumps(config))


def reweigh(file, change):
    save_file(change(load_file(file)), file)


def without(words):
    return lambda tensors: {key: value for key, value in tensors.items() if words not in key}


def with_stranger(tensors):
    return {**tensors, "stranger.weight": torch.zeros(2)}


def other_unet(model, **changes):
    config = {**UNet2DConditionModel.load_config(model / "unet"), **changes}
    UNet2DConditionModel.from_config(config).save_pretrained(model / "unet")


def more_tokens(model):
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    tokenizer.add_tokens(["<cat-toy>"])
    tokenizer.save_pretrained(model / "tokenizer")


UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
TIME = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80}
MODELS = {  # what is wrong: (what spoils the folder of a model, words of the sentence)
    "no tokenizer/": (lambda m: shutil.rmtree(m / "tokenizer"), "there is no folder tokenizer/"),
    "an empty tokenizer/": (
        lambda m: [f.unlink() for f in (m / "tokenizer").iterdir()],
        "tokenizer/ has no tokenizer",
    ),
    "no unet/": (lambda m: shutil.rmtree(m / "unet"), "there is no folder unet/"),
    "no config of the VAE": (lambda m: (m / "vae/config.json").unlink(), "vae/ has no config.json"),
    "no weights of the UNet": (lambda m: (m / UNET).unlink(), "unet/ has no .safetensors weights"),
    "weights as a pickle alone": (
        lambda m: (m / UNET).rename(m / "unet/diffusion_pytorch_model.bin"),
        "only diffusion_pytorch_model.bin, a pickle",
    ),
    "weights of a variant alone": (
        lambda m: (m / UNET).rename(m / "unet/diffusion_pytorch_model.fp16.safetensors"),
        "the weights in unet/ are of a variant: add --variant fp16",
    ),
    "tensors of the UNet missing": (lambda m: reweigh(m / UNET, without("mid_block")), "unet/ lacks"),
    "tensors of the text encoder missing": (lambda m: reweigh(m / TEXT, without("layers.1")), "text_encoder/ lacks"),
    "tensors too many": (lambda m: reweigh(m / UNET, with_stranger), "unet/ has no place for 1 tensors"),
    "a cut weight file": (lambda m: (m / UNET).write_bytes((m / UNET).read_bytes()[:5000]), "unet/ does not load"),
    "a UNet with 9 input channels": (lambda m: other_unet(m, in_channels=9), "unet/config.json has in_channels 9"),
    "a UNet with an added embedding": (lambda m: other_unet(m, **TIME), "has addition_embed_type 'text_time'"),
    "a UNet with class labels": (lambda m: other_unet(m, class_embed_type="timestep"), "class_embed_type 'timestep'"),
    "a UNet with a number of classes": (lambda m: other_unet(m, num_class_embeds=7), "num_class_embeds 7"),
    "noise predicted on a schedule without signal": (
        lambda m: edit(m / "scheduler/scheduler_config.json", rescale_betas_zero_snr=True),
        "rescale_betas_zero_snr",
    ),
    "an unknown prediction type": (
        lambda m: edit(m / "scheduler/scheduler_config.json", prediction_type="magic"),
        "prediction_type is 'magic'",
    ),
    "sample_size null": (lambda m: edit(m / "unet/config.json", sample_size=None), "has no sample_size: give --resol"),
    "sample_size of a rectangle": (lambda m: edit(m / "unet/config.json", sample_size=[8, 12]), "only squares"),
    "sample_size as text": (lambda m: edit(m / "unet/config.json", sample_size="8"), "sample_size '8', which is no"),
    "more tokens than the text encoder embeds": (more_tokens, "its text encoder embeds"),
    "a tokenizer that does not say how long a caption is": (
        lambda m: edit(m / "tokenizer/tokenizer_config.json", model_max_length="DROP"),
        "has no model_max_length",
    ),
    "model_index.json cut": (lambda m: (m / "model_index.json").write_text('{"_class'), "can't be read"),
    "another pipeline": (
        lambda m: edit(m / "model_index.json", _class_name="StableDiffusionInpaintPipeline"),
        "it is a StableDiffusionInpaintPipeline",
    ),
}


def model_of(pipelines, tmp_path):
    return Path(shutil.copytree(pipelines(), tmp_path / "model"))


def with_model(pipelines, tmp_path, model):
    arguments = flags(pipelines, "train_guided", tmp_path / "run", steps=1)
    arguments[arguments.index(pipelines())] = model
    if "--resolution" in arguments and "sample_size" in str(model):
        del arguments[arguments.index("--resolution") :][:2]
    return arguments


@each(MODELS, "a model with {}", "refused in a sentence that names file and key")
def test_a_model_is_whole_or_refused_before_anything_trains(pipelines, tmp_path, capsys, case):
    spoil, words = MODELS[case]
    model = model_of(pipelines, tmp_path)
    spoil(model)
    arguments = with_model(pipelines, tmp_path, model)
    if case == "sample_size null":  # the flags of every test give a resolution
        place = arguments.index("--resolution")
        del arguments[place : place + 2]
    error = error_of(train_guided, arguments, capsys)
    error = error[error.index("error: ") :]
    assert words in error and str(model) in error and error.count("\n") == 1, error
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.fault("a file as the model", "refused, with what is taken instead; a pickle is not opened")
def test_a_file_that_is_no_pipeline_is_refused_with_a_way_on(pipelines, tmp_path, capsys):
    shutil.copy(Path(pipelines()) / UNET, tmp_path / "model.safetensors")
    error = error_of(train_guided, with_model(pipelines, tmp_path, tmp_path / "model.safetensors"), capsys)
    assert "no single file of SD1.x, SD2.x or SDXL: give the folder of a diffusers pipeline" in error
    (tmp_path / "model.ckpt").write_bytes(pickle.dumps({}))
    error = error_of(train_guided, with_model(pipelines, tmp_path, tmp_path / "model.ckpt"), capsys)
    assert "it is a pickle, which is never opened" in error


@pytest.mark.fault("sample_size as a list", "read as the square that it is")
def test_sizes_as_lists_are_read(pipelines, tmp_path):
    model = model_of(pipelines, tmp_path)
    edit(model / "unet/config.json", sample_size=[8, 8])
    run_in_process(train_guided, *with_model(pipelines, tmp_path, model))


@pytest.mark.fault("a part absent that nobody uses (safety checker, feature extractor)", "no error")
def test_an_absent_part_that_nobody_uses_is_no_error(pipelines, tmp_path):
    model = model_of(pipelines, tmp_path)
    edit(
        model / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        image_encoder=["transformers", "CLIPVisionModelWithProjection"],
        requires_safety_checker=True,
    )
    run_in_process(train_guided, *with_model(pipelines, tmp_path, model))
    DiffusionPipeline.from_pretrained(tmp_path / "run/final", dtype=torch.float32)


@pytest.mark.fault("files of one variant alone", "what training took, sampling, judging and preparing take too")
def test_a_variant_is_taken_everywhere(pipelines, tmp_path, capsys):
    model, out = tmp_path / "model", ["--output_dir", tmp_path / "o"]
    DiffusionPipeline.from_pretrained(pipelines(), dtype=torch.float32).save_pretrained(model, variant="fp16")
    arguments = [word if word != pipelines() else model for word in quick(pipelines, tmp_path / "run", steps=1)]
    run_in_process(train_flash_lora, *arguments, "--num_ddim_steps", 1, "--variant", "fp16")
    lora = tmp_path / "run/lora/final"
    judged = ["--clip_model", "none", "--reader", "none"]
    run_in_process(inference, "--lora_path", lora, "--prompt", "a ring", "--steps", 1, *out, *judged)
    run_in_process(evaluate, "--models", lora, "--dataset_name", "shapes", "--num_images", 2, *out, "--steps", 1)
    plain = ["--pretrained_model_name_or_path", model, "--width_ratio", 0.5]
    assert "add --variant fp16" in error_of(prepare_unet_small, [*plain, "--output_dir", tmp_path / "s"], capsys)
    run_in_process(prepare_unet_small, *plain, "--output_dir", tmp_path / "s", "--variant", "fp16")


@pytest.mark.fault("a relative path to the model", "recorded whole: the output finds its parent from any folder")
def test_a_relative_path_can_be_followed_from_elsewhere(pipelines, tmp_path, monkeypatch):
    model_of(pipelines, tmp_path)
    monkeypatch.chdir(tmp_path)
    arguments = ["model" if word == pipelines() else word for word in quick(pipelines, "run", steps=1)]
    run_in_process(train_flash_lora, *arguments, "--num_ddim_steps", 1)
    monkeypatch.chdir("/")
    judged = ["--clip_model", "none", "--reader", "none", "--output_dir", tmp_path / "o", "--steps", 1]
    run_in_process(inference, "--lora_path", tmp_path / "run/lora/final", "--prompt", "a ring", *judged)


@pytest.mark.fault("tensors of a discriminator's DINOv2 missing", "refused in a sentence")
def test_a_feature_network_is_whole(pipelines, dinov2, tmp_path, capsys):
    torn = Path(shutil.copytree(dinov2, tmp_path / "dinov2"))
    reweigh(torn / "model.safetensors", without("layer.1"))
    arguments = quick(pipelines, tmp_path / "run", "--num_inference_steps", 2, *see_with(torn), steps=1)
    error = error_of(train_add, arguments, capsys)
    assert f"--feature_model_name_or_path {torn}: the model lacks" in error and "layer.1" in error


# LoRAs


@pytest.fixture(scope="module")
def lora(pipelines, tmp_path_factory):
    """(folder of a LoRA of rank 2 and alpha 8, its tensors, the images it makes)."""
    folder = tmp_path_factory.mktemp("lora")
    save_random_lora(load_pipeline(pipelines()), folder, pipelines(), alpha=8)
    return folder, load_file(folder / "pytorch_lora_weights.safetensors")


def images_with(pipelines, path, tmp_path, capsys):
    judged = [
        "--clip_model",
        "none",
        "--reader",
        "none",
        "--output_dir",
        tmp_path,
        "--steps",
        1,
        "--guidance_scale",
        1,
    ]
    model = ["--pretrained_model_name_or_path", pipelines(), "--resolution", 32]
    run_in_process(inference, "--lora_path", path, "--prompt", "a ring", *judged, *model)
    (image,) = (tmp_path / "images").rglob("*.png")
    return image.read_bytes(), capsys.readouterr().out


PREFIXES = {
    "peft's base_model.model.": "base_model.model.",
    "base_model.model.unet.": "base_model.model.unet.",
    "the UNet's own names": "",
    "diffusion_model.": "diffusion_model.",
    "model.diffusion_model.": "model.diffusion_model.",
}


def renamed(tensors, prefix):
    plain = {key.removeprefix("unet."): value for key, value in tensors.items()}
    return {prefix + key: value for key, value in plain.items()}


@each(PREFIXES, "a LoRA whose keys begin with {}", "read right")
def test_loras_with_the_keys_of_others_are_read_right(pipelines, lora, tmp_path, capsys, case):
    """With the alpha of peft's config beside it; without one it is the rank, which is said."""
    prefix, tensors = PREFIXES[case], lora[1]
    scaled = {key: value * 4 if "lora_B" in key else value for key, value in tensors.items()}  # alpha / rank, 8 / 2
    save_file(scaled, tmp_path / "right.safetensors")
    right, _ = images_with(pipelines, tmp_path / "right.safetensors", tmp_path / "a", capsys)
    (tmp_path / "other").mkdir()
    save_file(renamed(scaled, prefix), tmp_path / "other/adapter_model.safetensors")
    found, said = images_with(pipelines, tmp_path / "other", tmp_path / "b", capsys)
    assert found == right and "rank 2, alpha 2," in said
    save_file(renamed(tensors, prefix), tmp_path / "other/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["to_q", "to_v"], "of_the_future": 1}
    (tmp_path / "other/adapter_config.json").write_text(json.dumps(config))
    found, said = images_with(pipelines, tmp_path / "other", tmp_path / "c", capsys)
    assert found == right and "rank 2, alpha 8," in said


LORAS = {  # what is wrong: (tensors to the file's content, words of the sentence)
    "cut": (lambda tensors, file: file.write_bytes(file.read_bytes()[:3000]), "it does not load|no LoRA that can"),
    "empty": (lambda tensors, file: file.write_bytes(b""), "it does not load|no LoRA that can"),
    "with no tensor": (lambda tensors, file: save_file({}, file), "no weights for this pipeline|does not load"),
    "with the names of the original code": (
        lambda tensors, file: save_file({"diffusion_model.input_blocks.1.1.lora_A.weight": torch.zeros(2, 4)}, file),
        "names of the original Stable Diffusion code",
    ),
    "of another model": (
        lambda tensors, file: save_file({"encoder.block.0.lora_A.weight": torch.zeros(2, 4)}, file),
        "does not load|no weights for this",
    ),
}


@each(LORAS, "a LoRA {}", "refused in a sentence")
def test_what_is_no_lora_is_one_sentence(pipelines, lora, tmp_path, capsys, case):
    spoil, words = LORAS[case]
    file = Path(shutil.copy(lora[0] / "pytorch_lora_weights.safetensors", tmp_path / "lora.safetensors"))
    spoil(lora[1], file)
    flags = ["--lora_path", file, "--prompt", "a ring", "--output_dir", tmp_path / "o", "--steps", 1]
    model = ["--pretrained_model_name_or_path", pipelines(), "--resolution", 32]
    error = error_of(inference, [*flags, *model, "--clip_model", "none", "--reader", "none"], capsys)
    error = error[error.index("error: ") :]
    assert re.search(words, error) and str(file) in error and error.count("\n") == 1, error


@pytest.mark.fault("a LoRA on a model with fewer blocks", "it says how many adapters found no place")
def test_adapters_without_a_place_are_counted(pipelines, students, lora, tmp_path, capsys):
    small = Path(shutil.copytree(students("sd", "sd_small"), tmp_path / "small"))
    (small / "compression.json").unlink()  # of somebody else's, which says nothing of what was removed
    save_file(lora[1], tmp_path / "lora.safetensors")
    judged = ["--clip_model", "none", "--reader", "none", "--output_dir", tmp_path / "o", "--steps", 1]
    model = ["--pretrained_model_name_or_path", small, "--resolution", 32]
    run_in_process(inference, "--lora_path", tmp_path / "lora.safetensors", "--prompt", "a ring", *judged, *model)
    assert "adapters of the UNet found no place in this one" in capsys.readouterr().out


# Pickles


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path(self.target),)


@pytest.mark.fault("pickles planted in a model, a LoRA, a checkpoint and a data set", "none is ever opened")
def test_no_pickle_of_foreign_origin_is_opened(pipelines, uninterrupted, tmp_path, capsys):
    bomb, sprung = Bomb(), tmp_path / "sprung"
    bomb.target = str(sprung)
    content = pickle.dumps(bomb)
    model = model_of(pipelines, tmp_path)
    for name in ("unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin", "vae/model.pt", "data.pkl"):
        (model / name).write_bytes(content)
    data = tmp_path / "data"
    data.mkdir()
    from PIL import Image

    Image.new("RGB", (32, 32)).save(data / "a.png")
    (data / "a.txt").write_text("a ring")
    for name in ("b.pkl", "c.pt", "d.npy"):
        (data / name).write_bytes(content)
    (data / "e.png").write_bytes(content)
    (data / "e.txt").write_text("not a picture")
    arguments = [word for word in with_model(pipelines, tmp_path, model) if word not in ("--dataset_name", "shapes")]
    run_in_process(train_guided, *arguments, "--data_dir", data)
    for place in (tmp_path / "run/checkpoint-1").iterdir():
        if place.name not in ("state.json", "student.safetensors", "student_ema.safetensors"):
            place.write_bytes(content)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/pytorch_lora_weights.bin").write_bytes(content)
    longer = ["--data_dir", data, "--max_steps", 2, "--resume_from_checkpoint", "latest"]
    error_of(train_guided, [*arguments, *longer], capsys)
    state = tmp_path / "run/checkpoint-1/state.json"
    state.write_text(json.dumps({key: value for key, value in read_json(state).items() if key != "files"}))
    error_of(train_guided, [*arguments, *longer], capsys)  # as an older one, without checksums
    for path in (tmp_path / "lora", tmp_path / "lora/pytorch_lora_weights.bin"):
        error_of(inference, ["--lora_path", path, "--prompt", "a", "--output_dir", tmp_path / "o"], capsys)
    assert not sprung.exists()
