"""evaluate.py on tiny random pipelines, LoRAs and folders of images: figures, sharing, kept features, mistakes."""

import csv
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, FakeInception, launch, read_json, run_in_process, save_random_lora
from diffusers import DiffusionPipeline
from launching import error_of
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer, CLIPModel

import evaluate
import inference
from common import shapes
from common.contract import write_distillation
from common.errors import UsageError
from common.judging import image_sets, metrics, results

JUDGED = ("clip_score", "r_precision", "scene_accuracy", "frechet_clip")


class SquaredError(nn.Module):
    """A stand-in for LPIPS."""

    def forward(self, a, b):
        return ((a - b) ** 2).mean(dim=(1, 2, 3), keepdim=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory, pipelines):
    """A LoRA, folders of images, and files that are wrong."""
    root = tmp_path_factory.mktemp("evaluate")
    pipeline = DiffusionPipeline.from_pretrained(pipelines("sd"))
    torch.manual_seed(1)
    save_random_lora(pipeline, root / "final", pipelines("sd"), alpha=8)
    for name, count in (("five", 5), ("other", 5), ("three", 3), ("one", 1), ("empty", 0)):
        (root / name).mkdir()
        for i in range(count):
            scene = shapes.held_out_sample(i, seed=len(name))[0]
            Image.fromarray(scene).save(root / name / f"{i + 8}.png")  # 8.png comes before 10.png
    (root / "broken").mkdir()
    for i in range(3):
        (root / "broken" / f"{i}.png").write_text("no image")
    (root / "one.txt").write_text("a dog\n")
    (root / "prompts.txt").write_text("a dog\na cat\n")
    return root


def run(outdir, *flags):
    """evaluate.py in this process on shapes captions: the configurations of results.json."""
    outdir = Path(outdir)
    given = ["--output_dir", outdir / "out", "--cache_dir", outdir / "kept", "--num_real_images", 6]
    run_in_process(evaluate, *given, *flags)
    return read_json(outdir / "out/results.json")["configurations"]


SHAPES = ("--dataset_name", "shapes", "--num_images", 5, "--batch_size", 2)
PREFERENCE = ("--preference_model", ROOT / "assets/tiny-clip")


@pytest.fixture(scope="module")
def judged(root, pipelines, tmp_path_factory):
    """One run over two models at two step counts."""
    outdir = tmp_path_factory.mktemp("judged")
    return outdir, run(outdir, *SHAPES, *PREFERENCE, "--models", pipelines("sd"), root / "final", "--steps", 1, 2)


def test_files_and_rows(judged, root, pipelines):
    outdir, rows = judged
    names = {"grid.png", "quality_steps.png", "quality_size.png", "results.csv", "results.json", "images"}
    assert {path.name for path in (outdir / "out").iterdir()} == names
    teacher = f"{pipelines('sd')} {{}} steps w=7.5"
    assert [row["configuration"] for row in rows] == [
        teacher.format(2),
        teacher.format(1),
        f"{root}/final 1 steps",
        f"{root}/final 2 steps",
    ]
    assert [row["role"] for row in rows] == ["baseline", "model", "model", "model"]
    assert rows[0]["speedup"] == 1 and rows[-1]["timesteps"] == [999, 499] and rows[-1]["scheduler"] == "LCMScheduler"
    with open(outdir / "out/results.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == list(evaluate.COLUMNS)
    for row, line in zip(rows, table):
        assert row["images"] == 5 and row["seconds_per_image"] > row["seconds_per_image_without_decode"] > 0
        assert all(float(line[name]) == row[name] for name in JUDGED) and row["clip_score_low"] <= row["clip_score"]
        assert len(row["files"]) == 5 and all(Path(file).is_file() for file in row["files"])
        assert line["fid"] == line["lpips"] == ""


def test_preference_is_transformers_own(judged):
    """By the model's own logits on the images that were written; wins are counted against the reference's images."""
    model = CLIPModel.from_pretrained(PREFERENCE[1], dtype=torch.float32)
    captions = shapes.held_out_captions(5)
    tokenizer = AutoTokenizer.from_pretrained(PREFERENCE[1])
    tokens = tokenizer(captions, padding="max_length", truncation=True, max_length=20, return_tensors="pt")
    scores = []
    for row in judged[1]:
        pixels = torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in row["files"]]))
        with torch.no_grad():
            logits = model(pixel_values=pixels.permute(0, 3, 1, 2) / 127.5 - 1, **tokens).logits_per_image
        scores.append(logits.diagonal())
        assert row["preference"] == pytest.approx(scores[-1].mean().item(), rel=1e-4)
        assert row["preference_low"] <= row["preference"] <= row["preference_high"]
        assert row["preference_win"] == (0.5 if row is judged[1][0] else (scores[-1] > scores[0]).float().mean())


def test_the_manifest_is_of_what_was_judged_on_what(root, tmp_path):
    def manifest(*more):
        run(tmp_path, "--dataset_name", "shapes", "--models", tmp_path / "five", "--clip_model", "none", *more)
        return read_json(tmp_path / "out/results.json")["manifest"]

    shutil.copytree(root / "five", tmp_path / "five")
    first = manifest()
    assert manifest() == first and "torch" in first["versions"] and first["captions"]["count"] == 5

    def changed(*more):
        other = manifest(*more)
        return {name for name in first if other[name] != first[name]}

    assert changed("--seed", 1) == {"seed"}
    assert changed("--held_out_split", "judge") == {"captions"}
    assert changed(*PREFERENCE) == {"judges"}
    Image.new("RGB", (32, 32)).save(tmp_path / "five/8.png")
    assert changed() == {"models"}
    gone = results.weights_of(str(tmp_path / "gone"))  # while it was judged
    assert gone["path"] == str(tmp_path / "gone") and gone["sha256"] == {} and gone["problem"]


def test_the_commit_is_that_of_the_checkout(tmp_path, monkeypatch):
    (tmp_path / "common/judging").mkdir(parents=True)
    file = tmp_path / "common/judging/results.py"
    file.write_text("")
    monkeypatch.setattr(results, "__file__", str(file))
    assert results.commit() is None
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    clean = results.commit()
    assert len(clean["commit"]) == 40 and clean["changed"] is False
    (tmp_path / "more").write_text("")  # an output, say
    assert results.commit() == clean
    file.write_text("changed")
    assert results.commit() == {**clean, "changed": True}
    monkeypatch.setenv("PATH", "")  # no git
    assert results.commit() is None


def test_sizes_and_bytes(judged, root, pipelines):
    _, rows = judged
    pipeline = DiffusionPipeline.from_pretrained(pipelines("sd"))
    counts = [sum(p.numel() for p in getattr(pipeline, name).parameters()) for name in ("unet", "text_encoder", "vae")]
    assert [rows[0][f"{name}_parameters"] for name in ("unet", "text_encoder", "vae")] == counts
    assert rows[0]["parameters"] == sum(counts)
    size = sum(file.stat().st_size for file in Path(pipelines("sd")).rglob("*.safetensors"))
    lora = (root / "final/pytorch_lora_weights.safetensors").stat().st_size
    assert rows[0]["bytes_on_disk"] == size and rows[-1]["bytes_on_disk"] == size + lora
    assert rows[-1]["unet_parameters"] > rows[0]["unet_parameters"]


def test_images_are_those_of_inference(judged, root, tmp_path):
    """Scheduler, guidance and noise are what inference.py takes for the same output."""
    _, rows = judged
    flags = ["--lora_path", root / "final", "--held_out_captions", 5, "--clip_model", "none", "--reader", "none"]
    run_in_process(inference, *flags, "--output_dir", tmp_path, "--batch_size", 2, "--device", "cpu", "--steps", 1, 2)
    for row, entry in zip(rows[2:], read_json(tmp_path / "results.json")["configurations"]):
        for mine, theirs in zip(row["files"], entry["files"], strict=True):
            assert np.abs(np.asarray(Image.open(mine), int) - np.asarray(Image.open(tmp_path / theirs))).max() <= 1


def test_a_folder_scores_as_its_pipeline_and_features_are_kept(judged, tmp_path, monkeypatch, capsys):
    outdir, rows = judged
    shutil.copytree(outdir / "kept", tmp_path / "kept")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "kept").iterdir()}
    assert len(before) == 1
    folder = Path(rows[0]["files"][0]).parent
    monkeypatch.setattr(metrics, "load_lpips", lambda path: SquaredError())
    trunk = tmp_path / "trunk.safetensors"
    trunk.touch()
    others = ["--models", folder, Path(rows[1]["files"][0]).parent, "--lpips_trunk_path", trunk]
    same, other = run(tmp_path, *SHAPES, *others)
    assert all(same[name] == rows[0][name] and other[name] == rows[1][name] for name in JUDGED)
    assert same["lpips"] == 0 < other["lpips"] and "seconds_per_image" not in same and "steps" not in same
    assert other["lpips_low"] < other["lpips"] < other["lpips_high"]
    assert "kept CLIP features of 6" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "kept").iterdir()} == before
    # Another count is another key; a torn file is computed again.
    for file in before:
        file.write_bytes(file.read_bytes()[:100])
    (again, _) = run(tmp_path, *SHAPES, *others, "--num_real_images", 7)
    assert again["frechet_clip"] != same["frechet_clip"] and len(list((tmp_path / "kept").iterdir())) == 2
    (again, _) = run(tmp_path, *SHAPES, *others)
    assert again["frechet_clip"] == same["frechet_clip"] and len(list((tmp_path / "kept").iterdir())) == 2


def test_the_recorded_variant_of_a_loras_parent_is_judged_without_a_flag(judged, root, pipelines, tmp_path):
    parent, lora = tmp_path / "parent", tmp_path / "lora"
    DiffusionPipeline.from_pretrained(pipelines("sd")).save_pretrained(parent, variant="fp16")
    shutil.copytree(root / "final", lora)
    contract = read_json(lora / "distillation.json")
    write_distillation(lora, **{**contract, "parent": str(parent), "variant": "fp16"})
    (row,) = run(tmp_path, *SHAPES, "--models", lora)
    assert row["steps"] == 2 and all(row[name] == judged[1][-1][name] for name in (*JUDGED, *evaluate.SIZES))


def test_captions_belong_to_the_images_of_a_folder(root, tmp_path, capsys):
    captions, folder = tmp_path / "captions.txt", root / "five"
    flags = ["--models", folder, "--prompts_file", captions]
    flags += ["--cache_dir", tmp_path / "kept", "--outdir", tmp_path / "o"]
    flags += ["--clip_model", ROOT / "assets/tiny-clip"]
    for count in (1, 5, 6):
        captions.write_text("\n".join(f"a ring {number}" for number in range(count)))
        run_in_process(evaluate, *flags)
        assert ("the first 5 are taken for its" in capsys.readouterr().out) == (count == 6)
        assert read_json(tmp_path / "o/results.json")["configurations"]
    captions.write_text("a\nb\nc\nd\n")
    with pytest.raises(UsageError, match="five has 5 images, and there are 4 captions: an image without its caption"):
        run_in_process(evaluate, *flags)


def test_keys_of_kept_features(root, tmp_path):
    first, other = image_sets.real_folder(root / "five", 32), image_sets.real_folder(root / "other", 32)
    keys = [
        {"images": real.identity, "count": real.count, "network": network}
        for real, network in (
            (first, "a"),
            (first, "b"),
            (other, "a"),
            (image_sets.real_shapes(5), "a"),
            (image_sets.real_shapes(5, "choose"), "a"),
            (image_sets.real_shapes(5, "judge"), "a"),
            (image_sets.real_folder(root / "five", 32, 4), "a"),
            (image_sets.real_folder(root / "five", 16), "a"),
        )
    ]
    assert len({image_sets.feature_file(tmp_path, key) for key in keys}) == len(keys)
    image_sets.write_features(tmp_path, keys[0], torch.ones(5, 2))
    assert torch.equal(image_sets.read_features(tmp_path, keys[0]), torch.ones(5, 2))
    assert image_sets.read_features(tmp_path, keys[1]) is None
    file = root / "five/8.png"
    os.utime(file, (1, 1))  # another content has at least another time
    assert image_sets.real_folder(root / "five", 32).identity != first.identity
    network = FakeInception()
    before = metrics.fingerprint(network)
    network.weight += 1
    assert metrics.fingerprint(network) != before == metrics.fingerprint(FakeInception())


def test_fid_of_a_set_with_itself_and_as_torchmetrics_has_it(root, tmp_path, monkeypatch):
    from torchmetrics.image.fid import FrechetInceptionDistance

    monkeypatch.setattr(metrics, "load_inception", lambda path: FakeInception())
    (tmp_path / "weights.pth").touch()
    flags = ["--models", root / "five", root / "other", "--real_dir", root / "five", "--num_real_images", 5]
    same, other = run(tmp_path, *flags, "--inception_path", tmp_path / "weights.pth")
    assert abs(same["fid"]) < 1e-6 and "frechet_clip" not in same and "clip_score" not in same
    metric = FrechetInceptionDistance(feature=FakeInception()).set_dtype(torch.float64)
    for name, real in (("five", True), ("other", False)):
        images = [np.asarray(Image.open(file)) for file in image_sets.image_files(root / name)]
        metric.update(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), real=real)
    assert other["fid"] == pytest.approx(metric.compute().item(), rel=1e-5) and other["fid"] > 1e-3


def test_inception_is_torchmetrics_and_reads_tensors_only(root, tmp_path, monkeypatch):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torchmetrics.image.fid import NoTrainInceptionV3

    torch.save({}, tmp_path / "empty.pth")
    with monkeypatch.context() as context:
        context.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, weights: None)
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(tmp_path / "empty.pth"))
    weights = network.state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    loaded = metrics.load_inception(tmp_path / "weights.safetensors")
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = metrics.inception_features(loaded, images / 127.5 - 1)
    assert features.shape == (2, 2048) and torch.equal(features, network(images))
    torch.save({"code": FakeInception()}, tmp_path / "pickle.pth")
    for name in ("empty.pth", "pickle.pth"):
        with pytest.raises(ValueError, match=f"--inception_path .*{name}: .* does not hold them"):
            metrics.load_inception(tmp_path / name)


def test_two_processes_are_one(root, pipelines, tmp_path):
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])  # VGG-16's
    save_file({f"features.{k}": v for k, v in layers.state_dict().items()}, tmp_path / "vgg16.safetensors")
    flags = [
        *SHAPES,
        "--models",
        pipelines("sd"),
        root / "final",
        root / "five",
        "--steps",
        1,
        "--save_images",
        0,
        *PREFERENCE,
        "--lpips_trunk_path",
        tmp_path / "vgg16.safetensors",
    ]
    one = run(tmp_path / "one", *flags)
    flags += ["--output_dir", tmp_path / "two/out", "--num_real_images", 6, "--cache_dir", tmp_path / "two/kept"]
    output = launch(ROOT / "evaluate.py", *flags, processes=2).stdout
    two = read_json(tmp_path / "two/out/results.json")
    assert two["processes"] == 2 and output.count("No FID: ") == 1 and output.count("LoRA: rank 2") == 1
    for mine, theirs in zip(one, two["configurations"], strict=True):
        for name in (*JUDGED, "clip_score_low", "preference", "preference_win", "lpips", "lpips_high"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-6), name
        for a, b in zip(mine["files"], theirs["files"], strict=True):
            assert np.abs(np.asarray(Image.open(a), int) - np.asarray(Image.open(b))).max() <= 1
    assert one[0]["lpips"] == 0 and one[1]["lpips"] > 0  # a model with itself


def test_acceptance_command(tmp_path):
    """assets/tiny-sd and a student pipeline at 25 steps, by the defaults."""
    student = tmp_path / "out/kd/final"
    shutil.copytree(evaluate.TINY_SD, student)
    write_distillation(
        student,
        method="kd",
        parent=str(evaluate.TINY_SD),
        steps=None,
        timesteps=None,
        guidance="cfg",
        guidance_scale=2.0,
        target=None,
    )
    rows = run(tmp_path, "--models", evaluate.TINY_SD, student, "--steps", 3, "--num_images", 3)
    assert [row["steps"] for row in rows] == [3, 3] and rows[0]["unet_parameters"] == 4_931_668
    assert all(rows[0][name] == rows[1][name] for name in JUDGED)
    assert rows[0]["guidance_scale"] == 2 and rows[1]["clip_score_retention"] == 1
    assert (tmp_path / "out/quality_size.png").is_file() and not (tmp_path / "out/quality_steps.png").exists()


def test_data_dir_and_sdxl(pipelines, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(4):
        Image.fromarray(shapes.held_out_sample(i)[0]).resize((40, 48)).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text(f"picture number {i}")
    flags = ["--data_dir", data, "--num_real_images", 4, "--steps", 1, "--clip_model", ROOT / "assets/tiny-clip"]
    (row,) = run(tmp_path, *flags, "--models", pipelines("sdxl"), "--guidance_scale", 2)
    assert row["images"] == 4 and row["frechet_clip"] > 0 and "scene_accuracy" not in row and "r_precision" in row
    pipeline = DiffusionPipeline.from_pretrained(pipelines("sdxl"))
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2)
    assert row["text_encoder_parameters"] == sum(p.numel() for part in encoders for p in part.parameters())
    assert row["guidance_scale"] == 2 and row["configuration"].endswith("w=2")


def test_order_of_files_and_jobs(root):
    assert [file.name for file in image_sets.image_files(root / "five")] == [f"{i}.png" for i in range(8, 13)]
    assert evaluate.jobs_of(4, 4) == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert evaluate.jobs_of(5, 2) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert evaluate.jobs_of(2, 5) == [(0, 0), (1, 0)]


def test_short_names():
    names = results.short_names
    assert names(["assets/tiny-sd", "out/kd/final", "out/stage-8"]) == ["tiny-sd", "kd", "stage-8"]
    assert names(["a/kd/final", "b/kd/final", "a/kd/final"]) == ["a/kd", "b/kd", "a/kd"]
    assert names(["1/a/kd", "2/a/kd"]) == ["1/a/kd", "2/a/kd"]


@pytest.mark.parametrize("worst, scale", [(5.0, "linear"), (49.0, "log")])
def test_one_failed_distance_does_not_flatten_the_others(tmp_path, monkeypatch, worst, scale):
    import matplotlib.pyplot as plt

    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    rows = [{"model": "a", "steps": 2, "frechet_clip": 1.0}, {"model": "a", "steps": 1, "frechet_clip": worst}]
    results.plot(rows, "steps", "model", tmp_path / "plot.png")
    monkeypatch.undo()
    assert [axis.get_yscale() for axis in drawn[0].axes] == [scale]
    plt.close(drawn[0])


def test_reference_and_trained_steps(root, pipelines, tmp_path):
    def planned(*flags):
        return [
            (model.path, model.steps) for model in evaluate.plan_models(evaluate.parse_args(list(map(str, flags))))
        ]

    sd, lora = pipelines("sd"), str(root / "final")
    contract = read_json(root / "final/distillation.json")
    assert planned("--models", sd, lora) == [(sd, [50]), (lora, [2])]
    assert planned("--models", lora, "--reference", sd, "--reference_steps", 9, "--steps", 1, 4) == [
        (sd, [9]),
        (lora, [1, 4]),
    ]
    assert planned("--models", sd, lora, "--reference", lora) == [(lora, [2]), (sd, [50])]
    for target, steps in (("next", [2]), ("x0", [8, 4])):  # along its own steps, or any number of them
        contract["target"] = target
        shutil.copytree(lora, tmp_path / target)
        (tmp_path / target / "distillation.json").write_text(json.dumps(contract))
        path = str(tmp_path / target)
        assert planned("--models", sd, path, "--steps", 8, 4, "--trained_steps") == [(sd, [8, 4]), (path, steps)]
    assert planned("--models", root / "five", sd) == [(str(root / "five"), []), (sd, [50])]


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--models", "{root}/nowhere/final"], "--models {root}/nowhere/final: there is no such folder"),
        (["--models", "{root}/empty"], "--models {root}/empty: the folder holds no pipeline, no LoRA and no image"),
        (["--models", "{root}"], "(did you mean {root}/final?)"),
        (["--models", "{root}/one"], "holds one image"),
        (["--models", "{root}/broken"], "0.png can't be read as an image"),
        (
            ["--models", "{root}/five", "{root}/three"],
            "The numbers of images differ: 5 ({root}/five), 3 ({root}/three)",
        ),
        (["--models", "{root}/five", "--num_images", "4"], "The numbers of images differ: 5 ({root}/five), 4"),
        (["--models", "{root}/five"], "There is nothing to measure"),
        (
            ["--models", "{root}/five", "--real_dir", "{root}/one", "--clip_model", "{clip}"],
            "2 real images are needed",
        ),
        (["--models", "{root}/five", "--real_dir", "{root}/no"], "--real_dir {root}/no: there is no such folder"),
        (
            ["--models", "{root}/five", "--real_dir", "{root}/three", "--num_real_images", "9"],
            "9 real images are needed",
        ),
        (
            ["--models", "{root}/five", "--inception_path", "{root}/one.txt"],
            "--inception_path: there are no real images",
        ),
        (["--models", "{root}/five", "--reference_steps", "2"], "--reference_steps is about a pipeline"),
        (["--models", "{sd}"], "{sd} needs captions: add --prompts_file"),
        (["--models", "{sd}", "--prompts_file", "{root}/one.txt"], "There is one caption"),
        (["--models", "{sd}", "--prompts_file", "{root}/none.txt"], "none.txt can't be read"),
        (["--models", "{sd}", "--prompts_file", "{root}/one.txt", "--dataset_name", "shapes"], "Give one of"),
        (["--models", "{sd}", "--data_dir", "{root}/five"], "has a .txt caption"),
        (["--models", "{root}/final", "--guidance_scale", "3"], "--guidance_scale 3: no model takes it"),
        (["--guidance_scale", "-1"], "negative"),
        (["--num_images", "1"], "--num_images 1: statistics need two images"),
        (["--steps", "2000"], "1000 timesteps"),
        (["--resolution", "33"], "--resolution 33 is not a multiple of 4"),
        (["--inception_path", "{root}/no.pth"], "--inception_path {root}/no.pth: there is no such file"),
        (
            ["--inception_path", "{root}/one.txt"],
            "--inception_path {root}/one.txt: torch-fidelity's Inception weights: it does not hold",
        ),
        (["--lpips_trunk_path", "{root}/one.txt"], "LPIPS compares two outputs"),
        (["--models", "{sd}", "{tiny}", "{root}/five", "--resolution", "33"], "multiple of 4"),
        (["--clip_model", "{root}/nowhere"], "--clip_model: No CLIP judge at"),
        (["--reader", "{root}/nowhere"], "--reader {root}/nowhere: there is no scene reader"),
        (["--outdir", "{root}/one.txt/out"], "--output_dir {root}/one.txt/out can't be made"),
        (["--cache_dir", "{root}/one.txt/out"], "--cache_dir {root}/one.txt/out can't be made"),
        (["--dtype", "fp16"], "needs a GPU"),
        (["--preference_model", "{root}/nowhere"], "--preference_model: No CLIP judge at '{root}/nowhere'"),
        (["--models", "{root}/five", "--preference_model", "{clip}"], "--preference_model needs captions"),
        (["--held_out_split", "choose", "--num_images", "501"], "--num_images 501: there are 500 held-out captions"),
        (["--held_out_split", "judge", "--num_real_images", "1501"], "(judge): 1501 real images are needed"),
        (["--held_out_split", "judge", "--prompts_file", "{root}/prompts.txt"], "held-out captions of shapes alone"),
        (["--held_out_split", "judge", "--models", "{root}/five"], "--held_out_split judge is about the held-out"),
        (["--held_out_split", "judge", "--models", "{sd}"], "{sd} needs captions: add --prompts_file"),
    ],
)
def test_mistakes_are_one_sentence(root, pipelines, tmp_path, capsys, monkeypatch, flags, sentence):
    monkeypatch.setattr(evaluate, "load_pipeline", lambda *_, **__: pytest.fail("a pipeline was loaded first"))
    monkeypatch.setattr(image_sets, "sharded", lambda *_: pytest.fail("real images were judged first"))
    known = {"root": root, "sd": pipelines("sd"), "clip": ROOT / "assets/tiny-clip", "tiny": evaluate.TINY_SD}
    flags = [flag.format(**known) for flag in flags]
    before = ["--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "kept", "--clip_model", "none"]
    error = error_of(evaluate, [*before, *flags], capsys).splitlines()
    assert len(error) == 1
    assert error[0].startswith("error: ") and sentence.format(**known) in error[0]


def test_writing_over_what_is_judged_is_refused(judged, root, tmp_path):
    outdir, rows = judged
    with pytest.raises(ValueError, match="this run writes there"):
        run(outdir, *SHAPES, "--models", Path(rows[0]["files"][0]).parent)
    assert json.loads((outdir / "out/results.json").read_text())["configurations"][0]["images"] == 5
