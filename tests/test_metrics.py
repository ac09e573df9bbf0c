"""The judges, without any trained asset: a CLIP of random weights, fake readers, closed forms."""

import json

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import random_pipeline
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from common import shapes
from common.errors import UsageError
from common.judging import metrics
from common.judging.metrics import ClipJudge, SceneReader, decoded_lpips

PAIR = next(scene for scene in shapes.held_out_scenes() if scene[1] and scene[2] != scene[5] and scene[3] != scene[6])
ALONE = next(scene for scene in shapes.held_out_scenes() if not scene[1])


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIPModel of random weights, saved in fp16 as assets/tiny-clip is, and a tokenizer of letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=99)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=53)
    text = dict(vocab_size=len(tokenizer), max_position_embeddings=70, **sizes, **ids)
    vision = dict(image_size=16, patch_size=8, **sizes)
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def judge(clip_folder):
    return ClipJudge(clip_folder)


def random_pixels(count, size=16, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class OneHotJudge:
    """Text features that identify the caption; `favourites` share one."""

    def __init__(self, favourites=()):
        self.favourites, self.rows = set(favourites), {}

    def text_features(self, captions):
        rows = [0 if c in self.favourites else self.rows.setdefault(c, len(self.rows) + 1) for c in captions]
        return torch.nn.functional.one_hot(torch.tensor(rows), 4096).float()


class FakeReader(nn.Module):
    """Reads the given scenes, whatever the pixels; keeps the pixels it saw."""

    def __init__(self, scenes):
        super().__init__()
        self.scenes, self.device_of = torch.tensor(scenes), nn.Parameter(torch.zeros(()))
        self.seen = []

    def forward(self, pixels):
        start = sum(map(len, self.seen))
        self.seen.append(pixels)
        scenes = self.scenes[start : start + len(pixels)]
        sizes = enumerate(shapes.ATTRIBUTES.items())
        return {name: torch.nn.functional.one_hot(scenes[:, i], classes).float() for i, (name, classes) in sizes}


def test_bootstrap_interval_covers_and_shrinks():
    rng = np.random.default_rng(0)
    covered = sum(
        low <= 0 <= high
        for _, low, high in (metrics.bootstrap_interval(rng.normal(size=100), seed=i) for i in range(100))
    )
    assert 88 <= covered <= 100
    mean, low, high = metrics.bootstrap_interval(torch.arange(100) % 2 == 0)
    assert mean == 0.5 and low < 0.5 < high
    # The normal approximation: 1.96 standard errors on either side.
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 10, rel=0.1)
    _, low4, high4 = metrics.bootstrap_interval([i % 2 for i in range(1600)])
    assert high4 - low4 == pytest.approx((high - low) / 4, rel=0.15)
    assert metrics.bootstrap_interval([0.0, 1.0, 5.0]) == metrics.bootstrap_interval(np.array([0.0, 1.0, 5.0]))
    assert metrics.bootstrap_interval([2.0] * 5) == (2.0, 2.0, 2.0)
    for bad in ([], [[1.0]], [float("nan")]):
        with pytest.raises(ValueError, match="bootstrap"):
            metrics.bootstrap_interval(bad)


def test_frechet_distance_is_the_closed_form():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6))
    fake = rng.normal(size=(150, 6)) @ rng.normal(size=(6, 6)) + 0.5
    sigma1, sigma2 = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    expected = ((real.mean(0) - fake.mean(0)) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)
    real, fake = torch.tensor(real), torch.tensor(fake)
    assert metrics.frechet_distance(real, fake) == pytest.approx(expected, rel=1e-8)
    assert metrics.frechet_distance(fake, real) == pytest.approx(expected, rel=1e-8)
    assert metrics.frechet_distance(real, real) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet_distance(real, real + 3) == pytest.approx(6 * 9, rel=1e-6)
    for bad in (fake[:1], fake[:, :5], fake[0]):
        with pytest.raises(ValueError, match="Fréchet"):
            metrics.frechet_distance(real, bad)


def test_frechet_distance_is_torchmetrics_on_the_same_network(judge):
    class Network(nn.Module):
        num_features = 16

        def forward(self, pixels):
            return judge.pooled_features(pixels).double()

    real, fake = random_pixels(40, seed=1), random_pixels(40, seed=2).sign()
    metric = FrechetInceptionDistance(feature=Network())
    for part_real, part_fake in zip(real.split(16), fake.split(16)):
        metric.update(part_real, real=True)
        metric.update(part_fake, real=False)
    ours = metrics.frechet_distance(judge.pooled_features(real), judge.pooled_features(fake))
    assert ours == pytest.approx(metric.compute().item(), rel=1e-4) and ours > 0


def test_clip_scores_clamp_at_zero():
    image = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    text = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.6, 0.8]])
    assert torch.allclose(metrics.clip_scores(image, text), torch.tensor([100.0, 0.0, 60.0]))
    with pytest.raises(ValueError, match="Pairs"):
        metrics.clip_scores(image, text[:2])


def test_shapes_distractors():
    caption = shapes.caption_of(PAIR)
    distractors = metrics.shapes_distractors(caption, 3)
    assert len(set(distractors)) == len(distractors) == 99 and caption not in distractors
    metrics.shapes_distractors.cache_clear()
    assert distractors == metrics.shapes_distractors(caption, 3) != metrics.shapes_distractors(caption, 4)
    assert distractors != metrics.shapes_distractors(caption, 3, seed=1)
    b, r, s, c, z, s2, c2, z2 = PAIR
    swaps = {shapes.caption_of((b, r, s, c2, z, s2, c, z2)), shapes.caption_of((b, r, s2, c2, z2, s, c, z))}
    assert swaps < set(distractors[:2]) | {caption} and swaps < set(metrics.shapes_distractors(caption, 3, count=5))
    near = {d for d in distractors if sum(x != y for x, y in zip(shapes.scene_of(d), PAIR)) == 1}
    assert len(near) >= 30  # every scene that differs in one attribute
    held_out = set(shapes.held_out_captions())
    assert sum(d in held_out for d in distractors) >= 99 - 32
    alone = metrics.shapes_distractors(shapes.caption_of(ALONE), 0)
    assert len(set(alone)) == 99 and shapes.caption_of(ALONE) not in alone
    # One in thirty drawings would hold the own caption, which is held out too.
    assert not any(caption in metrics.shapes_distractors(caption, index) for index in range(100))
    with pytest.raises(ValueError, match="a dog"):
        metrics.shapes_distractors("a dog", 0)


def test_caption_distractors():
    captions = ["a dog", "a cat", "a dog", "a bird"]
    assert metrics.caption_distractors(captions, 0) == ["a cat", "a bird"]
    many = [f"caption {i}" for i in range(200)]
    drawn = metrics.caption_distractors(many, 7)
    assert len(set(drawn)) == 99 and many[7] not in drawn and drawn == metrics.caption_distractors(many, 7)


@pytest.mark.parametrize("captions", [shapes.held_out_captions(6), ["a dog", "a cat", "a dog", "a bird"]])
def test_r_precision_of_an_oracle_an_adversary_and_ties(captions):
    oracle = OneHotJudge()
    assert metrics.r_precision(oracle, oracle.text_features(captions), captions).all()
    # Images of the next caption: nearest to a distractor, or to nothing.
    moved = [next(c for c in captions if c != own) for own in captions]
    assert not metrics.r_precision(oracle, oracle.text_features(moved), captions).any()
    every = {c for i in range(len(captions)) for c in metrics.caption_distractors(captions, i)}
    every |= {d for i, c in enumerate(captions) if shapes.scene_of(c) for d in metrics.shapes_distractors(c, i)}
    same = OneHotJudge(every | set(captions))
    assert not metrics.r_precision(same, same.text_features(captions), captions).any()


def test_r_precision_needs_something_to_compare():
    oracle = OneHotJudge()
    with pytest.raises(ValueError, match="two distinct"):
        metrics.r_precision(oracle, oracle.text_features(["a dog"] * 2), ["a dog"] * 2)
    with pytest.raises(ValueError, match="one caption"):
        metrics.r_precision(oracle, oracle.text_features(["a dog"]), ["a dog", "a cat"])


def test_scene_accuracy():
    captions = [shapes.caption_of(PAIR), shapes.caption_of(ALONE)] * 40
    scenes = [PAIR, ALONE] * 40
    reader, pixels = FakeReader(scenes), random_pixels(80, size=32)
    assert metrics.scene_accuracy(reader, pixels, captions).all()
    assert torch.equal(torch.cat(reader.seen), pixels)
    # Another second object is an error where there is one, and not judged where there is none.
    moved = [(*scene[:5], (scene[5] + 1) % 6, (scene[6] + 1) % 8, 1 - scene[7]) for scene in scenes]
    assert metrics.scene_accuracy(FakeReader(moved), pixels, captions).tolist() == [False, True] * 40
    for position, classes in enumerate(list(shapes.ATTRIBUTES.values())[:5]):
        other = [(*s[:position], (s[position] + 1) % classes, *s[position + 1 :]) for s in scenes]
        assert not metrics.scene_accuracy(FakeReader(other), pixels, captions).any()
    # Larger images are averaged down to what the reader learned from.
    reader = FakeReader(scenes)
    large = random_pixels(80, size=128)
    metrics.scene_accuracy(reader, large, captions)
    assert torch.allclose(torch.cat(reader.seen), torch.nn.functional.avg_pool2d(large, 4), atol=1e-6)
    with pytest.raises(ValueError, match="'a dog'"):
        metrics.scene_accuracy(reader, pixels[:2], [captions[0], "a dog"])
    with pytest.raises(ValueError, match="one caption"):
        metrics.scene_accuracy(reader, pixels, captions[:2])


def test_scene_reader_round_trip(tmp_path):
    torch.manual_seed(0)
    reader = SceneReader(width=8).half().float()  # weights are saved in fp16
    reader.save_pretrained(tmp_path)
    loaded = SceneReader.from_pretrained(tmp_path)
    assert loaded.config == {"width": 8} and not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    pixels = random_pixels(2, size=32)
    for name, logits in reader.eval()(pixels).items():
        assert logits.shape == (2, shapes.ATTRIBUTES[name]) and torch.equal(loaded(pixels)[name], logits)


def test_clip_judge_features(judge):
    assert judge.model.dtype == torch.float32 and not judge.model.training
    pixels, captions = random_pixels(70), [*shapes.held_out_captions(69), "a dog " * 60]
    images, texts, pooled = judge.image_features(pixels), judge.text_features(captions), judge.pooled_features(pixels)
    assert images.shape == texts.shape == (70, 8) and pooled.shape == (70, 16)
    assert torch.allclose(images.norm(dim=-1), torch.ones(70)) and torch.allclose(texts.norm(dim=-1), torch.ones(70))
    tokens = judge.tokenizer(captions[3], return_tensors="pt")  # unpadded
    with torch.no_grad():
        outputs = judge.model(pixel_values=pixels[3:4], **tokens)
    assert torch.allclose(outputs.image_embeds[0], images[3], atol=1e-5)
    assert torch.allclose(outputs.text_embeds[0], texts[3], atol=1e-5)
    assert torch.allclose(
        judge.model.visual_projection(pooled[3]),
        judge.model.get_image_features(pixels[3:4]).pooler_output[0],
        atol=1e-5,
    )
    for bad in (pixels[0], pixels[:0], pixels[:, :1], (pixels * 100).byte()):
        with pytest.raises(ValueError, match="Pixels"):
            judge.image_features(bad)


def test_clip_judge_encodes_a_caption_once(clip_folder, monkeypatch):
    judge, encoded = ClipJudge(clip_folder), []
    encode = judge.model.get_text_features
    monkeypatch.setattr(judge.model, "get_text_features", lambda ids: encoded.append(len(ids)) or encode(ids))
    first = judge.text_features(["a dog", "a cat", "a dog"])
    assert encoded == [2] and torch.equal(first[0], first[2])
    second = judge.text_features(["a bird", "a cat"])
    assert encoded == [2, 1] and torch.equal(second[1], first[1]) and not torch.equal(second[0], first[0])
    captions = shapes.held_out_captions(3)
    for _ in range(2):
        metrics.r_precision(judge, judge.image_features(random_pixels(3)), captions)
    pool = {*captions, *(d for i, c in enumerate(captions) for d in metrics.shapes_distractors(c, i))}
    assert sum(encoded) == 3 + len(pool) and max(encoded) == metrics.BATCH


def test_clip_judge_preprocessing(clip_folder, judge, tmp_path):
    pixels = random_pixels(2)
    assert torch.allclose(judge.preprocess(pixels), pixels, atol=1e-6)
    assert torch.allclose(judge.preprocess(pixels * 9), (pixels * 9).clamp(-1, 1), atol=1e-6)
    assert judge.preprocess(random_pixels(2, size=33)).shape == (2, 3, 16, 16)
    wide = torch.cat([-torch.ones(1, 3, 32, 32), torch.ones(1, 3, 32, 32), -torch.ones(1, 3, 32, 32)], dim=-1)
    assert judge.preprocess(wide).shape == (1, 3, 16, 16) and judge.preprocess(wide)[..., 2:-2].min() > 0.9
    for file in clip_folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
    expected = ((pixels + 1) / 2 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(ClipJudge(tmp_path).preprocess(pixels), expected, atol=1e-6)


@pytest.mark.parametrize("damage", ["nothing there", "no weights", "no tokenizer", "no CLIP", "bad json", "missing"])
def test_clip_judge_refuses_in_one_sentence(clip_folder, tmp_path, damage):
    path = tmp_path / "judge"
    if damage != "nothing there":
        path.mkdir()
        for file in clip_folder.iterdir():
            (path / file.name).write_bytes(file.read_bytes())
    if damage == "no weights":
        (path / "model.safetensors").unlink()
    if damage == "no tokenizer":
        (path / "tokenizer.json").unlink()
        (path / "tokenizer_config.json").unlink()
    if damage == "no CLIP":
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "model_type": "siglip"}))
    if damage == "bad json":
        (path / "config.json").write_text("{")
    if damage == "missing":
        weights = metrics.load_file(path / "model.safetensors")
        weights.pop("visual_projection.weight")
        metrics.save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError) as error:
        ClipJudge(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and ". " not in message and message.endswith(".")


def test_judge_images(judge):
    captions = shapes.held_out_captions(5)
    reader = FakeReader([shapes.scene_of(caption) for caption in captions])
    real = metrics.shapes_real_features(judge, count=70)
    assert real.shape == (70, 16) and torch.equal(real[:3], metrics.shapes_real_features(judge, count=70)[:3])
    choose = metrics.shapes_real_features(judge, 10, "choose")  # each split's own renders
    positions = [index for index in shapes.held_out_indices("choose") if index < 70][:10]
    assert len(positions) == 10 and torch.allclose(choose, real[positions], atol=1e-5)
    pixels = random_pixels(5, size=32)
    row = json.loads(json.dumps(metrics.judge_images(pixels, captions, judge, reader, real)))
    assert list(row) == ["clip_score", "r_precision", "scene_accuracy", "frechet", "per_image"]
    assert row["scene_accuracy"] == [1.0, 1.0, 1.0] and row["per_image"]["scene_accuracy"] == [True] * 5
    for name, values in row["per_image"].items():
        mean, low, high = row[name]
        assert len(values) == 5 and low <= mean <= high and mean == pytest.approx(np.mean(values))
    assert row["frechet"] == pytest.approx(metrics.frechet_distance(real, judge.pooled_features(pixels)))
    assert list(metrics.judge_images(pixels, ["a dog"] * 5, judge)) == ["clip_score", "per_image"]


def test_preference_is_the_models_own_scaled_cosine(clip_folder, tmp_path):
    """As transformers computes it, whose logits PickScore takes; below zero too, where clip_scores end."""
    model = CLIPModel.from_pretrained(clip_folder, dtype=torch.float32)
    model.logit_scale.data.fill_(1.5)  # nothing like CLIP's 100
    model.save_pretrained(tmp_path)
    CLIPTokenizer.from_pretrained(clip_folder).save_pretrained(tmp_path)
    judge, pixels, captions = ClipJudge(tmp_path), random_pixels(40), shapes.held_out_captions(40)
    found = metrics.preference_scores(judge, judge.pooled_features(pixels), captions)
    tokens = judge.tokenizer(captions, padding="max_length", max_length=70, truncation=True, return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(pixel_values=pixels, **tokens).logits_per_image
    torch.testing.assert_close(found, logits.diagonal(), atol=1e-5, rtol=1e-5)
    assert found.min() < 0 < found.max()
    with pytest.raises(ValueError, match="got 40 images and 39 captions"):
        metrics.preference_scores(judge, judge.pooled_features(pixels), captions[1:])


def test_lpips_compares_the_same_random_crop_per_sample(monkeypatch):
    monkeypatch.setattr(metrics, "LPIPS_CROP", 4)
    vae, sizes = random_pipeline("sd").vae.requires_grad_(False), []

    def network(a, b):
        sizes.append(tuple(a.shape))
        return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)

    x0, target = torch.randn(4, 4, 8, 8, requires_grad=True), torch.randn(4, 4, 8, 8)
    distance = decoded_lpips(network, vae, 0, 7, [0, 1, 2, 3], x0, target)
    assert distance.shape == (4,) and sizes == [(4, 3, 16, 16)]
    distance.sum().backward()
    crops = (x0.grad != 0).any(dim=1).flatten(1)
    assert crops.sum(dim=1).tolist() == [16] * 4 and len(crops.unique(dim=0)) > 1
    assert decoded_lpips(network, vae, 0, 7, [0, 1, 2, 3], x0, x0).abs().max() == 0
    other_rank = decoded_lpips(network, vae, 0, 7, [2, 3], x0[2:], target[2:])
    torch.testing.assert_close(other_rank, distance[2:])
    monkeypatch.setattr(metrics, "LPIPS_CROP", 32)
    decoded_lpips(network, vae, 0, 7, [0, 1, 2, 3], x0, target)
    assert sizes[-1] == (4, 3, 32, 32)


@pytest.mark.parametrize("load, flag", [("load_lpips", "--lpips_trunk_path"), ("load_inception", "--inception_path")])
def test_weights_that_can_not_be_had_are_one_sentence(tmp_path, monkeypatch, load, flag):
    """Of a file, or of a download, which offline fails: a user's to mend, as it says which flag takes a file."""

    def offline(*_, **__):
        raise OSError("<urlopen error: no network>\nand more")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "broken.pth").write_text("no")
    for path, said in ((tmp_path / "broken.pth", "does not hold them"), ("download", "can't be fetched")):
        with pytest.raises(UsageError, match=f"{flag} {path}: .* {said}") as error:
            getattr(metrics, load)(path)
        assert "\n" not in str(error.value)
