"""The rendered shapes and the embedded default that was trained on them: what every later number stands on."""

import hashlib
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import DiffusionPipeline
from launching import fork_and_wait
from transformers import AutoConfig, AutoTokenizer

import prepare_tiny_sd
from common import shapes
from common.contract import read_distillation
from common.errors import UsageError
from common.judging.metrics import ClipJudge, SceneReader, r_precision, scene_accuracy
from common.pipelines import load_pipeline
from common.small_models import to_pixels

ASSETS = ROOT / "assets"


def renders(count):
    images, scenes = zip(*(shapes.held_out_sample(i) for i in range(count)))
    return to_pixels(images), [shapes.caption_of(scene) for scene in scenes]


def test_captions_and_scenes_are_one_to_one():
    scenes = [shapes.training_scene(0, index)[0] for index in range(500)]
    assert all(shapes.scene_of(shapes.caption_of(scene)) == scene for scene in scenes)
    assert shapes.scene_of("a photo of a cat") is None
    assert shapes.scene_of("a small red circle on a white background, 4k") is None


def test_held_out_captions_are_never_trained_on():
    held_out = set(shapes.held_out_captions())
    assert len(held_out) == 2000 == len(shapes.held_out_captions())
    assert not held_out & {
        shapes.caption_of(shapes.training_scene(seed, i)[0]) for seed in (0, 3) for i in range(3000)
    }
    kinds = [shapes.scene_of(caption)[1] for caption in shapes.held_out_captions()]
    assert kinds.count(0) == 100 and min(kinds.count(1), kinds.count(2)) > 800


def test_captions_to_choose_by_are_not_those_that_judge():
    every = shapes.held_out_captions()
    choose, judge = (shapes.held_out_captions(split=split) for split in ("choose", "judge"))
    assert (len(choose), len(judge)) == (500, 1500) and sorted(choose + judge) == sorted(every)
    assert [sum(not shapes.scene_of(text)[1] for text in captions) for captions in (choose, judge)] == [25, 75]
    for split, captions in (("choose", choose), ("judge", judge), ("all", every)):  # whatever the number asked for
        assert shapes.held_out_captions(7, split) == captions[:7] == [c for c in every if c in captions][:7]
    # Which is which must never change: figures of before would judge by what they chose by.
    assert hashlib.sha256("\n".join(judge).encode()).hexdigest()[:16] == "b49d0f061deeef61"
    shapes.check_count("--flag", 500, "choose")
    with pytest.raises(UsageError, match="--flag 501: there are 500 held-out captions in the split 'choose'"):
        shapes.check_count("--flag", 501, "choose")


def test_renders_derive_from_seed_and_index():
    first, again, other = (shapes.training_sample(*key)[0] for key in ((0, 5), (0, 5), (1, 5)))
    assert first.dtype == np.uint8 and first.shape == (32, 32, 3)
    assert (first == again).all() and (first != other).any()


def test_two_objects_stand_where_the_caption_says():
    for index in range(300):
        scene, rng = shapes.training_scene(0, index)
        if scene[1]:
            (x, y, r), (x2, y2, r2) = shapes._place(scene, rng)
            along, across = ((y2 - y), abs(x2 - x)) if scene[1] == 1 else ((x2 - x), abs(y2 - y))
            assert along > across and along >= r + r2  # apart, and more along the relation than across it


def test_hard_negatives_differ_in_one_attribute_or_are_swaps():
    scene = shapes.scene_of("a small red circle above a large blue square on a white background")
    found = shapes.hard_negatives(scene, np.random.default_rng(0), 100)
    assert len(found) == len(set(found)) == 32 and shapes.caption_of(scene) not in found
    assert "a small blue circle above a large red square on a white background" in found
    assert "a large blue square above a small red circle on a white background" in found
    different = [sum(a != b for a, b in zip(scene, shapes.scene_of(caption))) for caption in found]
    assert sorted(different)[:30] == [1] * 30


def test_every_caption_word_is_one_token_and_other_words_are_spelled():
    tokenizer = prepare_tiny_sd.build_tokenizer()
    for caption in shapes.held_out_captions(200):
        assert len(tokenizer(caption).input_ids) == len(caption.split()) + 2 <= tokenizer.model_max_length
    assert tokenizer.unk_token_id not in tokenizer("zebra, ok!", add_special_tokens=False).input_ids


def test_assets_are_small_safetensors():
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} >= {"tiny-reader", "tiny-clip", "unet", "vae", "text_encoder"}
    assert all(path.stat().st_size < 15e6 for path in files)
    assert not [path for path in files if re.search(r"\.(bin|pt|pth|pkl|ckpt)$", path.name)]


def test_tiny_sd_has_the_structure_of_sd15():
    pipeline = load_pipeline(ASSETS / "tiny-sd")
    unet = pipeline.unet.config
    assert unet.in_channels == 4 and unet.sample_size == 8 and unet.layers_per_block == 2
    assert unet.down_block_types == ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]
    assert pipeline.unet.mid_block is not None and pipeline.vae.config.latent_channels == 4
    assert pipeline.scheduler.config.beta_schedule == "scaled_linear"
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    contract = read_distillation(ASSETS / "tiny-sd")
    assert contract["guidance"] == "cfg" and contract["guidance_scale"] > 1


def loads_in_one_dtype(folder):
    """Where none is named transformers takes the config's and diffusers fp32."""
    components = DiffusionPipeline.from_pretrained(folder).components.values()
    return {part.dtype for part in components if isinstance(part, torch.nn.Module)} == {torch.float32}


def test_tiny_sd_loads_with_no_dtype_named():
    assert loads_in_one_dtype(ASSETS / "tiny-sd")


@pytest.mark.parametrize("folder", ["tiny-clip", "tiny-sd/text_encoder"])
def test_the_end_of_text_is_the_tokenizers(folder):
    config = AutoConfig.from_pretrained(ASSETS / folder)
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / folder.replace("text_encoder", "tokenizer"))
    eos = getattr(config, "text_config", config).eos_token_id
    assert eos == tokenizer.eos_token_id != 2  # 2 would mean transformers' legacy pooling


def test_the_reader_reads_real_renders():
    pixels, captions = renders(300)
    assert scene_accuracy(SceneReader.from_pretrained(ASSETS / "tiny-reader"), pixels, captions).float().mean() >= 0.99


def test_the_clip_tells_captions_apart():
    pixels, captions = renders(100)
    judge = ClipJudge(ASSETS / "tiny-clip")
    assert r_precision(judge, judge.image_features(pixels), captions).float().mean() >= 0.9


def test_the_teacher_draws_what_it_is_told():
    pipeline, captions = load_pipeline(ASSETS / "tiny-sd"), shapes.held_out_captions(16)
    scale = read_distillation(ASSETS / "tiny-sd")["guidance_scale"]
    images = pipeline(
        captions,
        num_inference_steps=20,
        guidance_scale=scale,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images
    reader = SceneReader.from_pretrained(ASSETS / "tiny-reader")
    assert scene_accuracy(reader, images * 2 - 1, captions).float().mean() >= 0.8


def test_every_part_trains_and_a_second_run_trains_nothing(tmp_path):
    trained = ["reader", "vision", "clip", "vae", "unet", "decoder"]
    steps = [word for part in trained for word in (f"--{part}_steps", "2")]
    few = ["--latents", "70", "--guidance_captions", "2", "--report_captions", "3"]
    folders = ["--output_dir", tmp_path / "assets", "--work_dir", tmp_path / "work"]
    command = [ROOT / "prepare_tiny_sd.py", *folders, *steps, *few]
    first = fork_and_wait(tmp_path, *command)
    assert all(f"{part} step 2 loss" in first for part in trained)
    assert "| teacher, 50 DDIM steps" in first and "| VAE reconstructions" in first
    weights = {file: file.read_bytes() for file in (tmp_path / "assets").rglob("*.safetensors")}
    assert {file.parent.name for file in weights} == {"tiny-reader", "tiny-clip", "unet", "vae", "text_encoder"}
    assert loads_in_one_dtype(tmp_path / "assets" / "tiny-sd")
    (tmp_path / "said.txt").unlink()
    second = fork_and_wait(tmp_path, *command, "--parts", *trained)
    assert "loss" not in second and all(f"{part}: resuming at step 2 of 2" in second for part in trained)
    assert weights == {file: file.read_bytes() for file in (tmp_path / "assets").rglob("*.safetensors")}
