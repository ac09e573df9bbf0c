"""prepare_tiny_sd.py on one's own pictures: a teacher and judges that open, resume, and what it refuses."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import read_json, run_in_process
from launching import assert_every_flag_has_help, error_of
from safetensors.torch import load_file
from test_class_files import write_idx
from test_data import image_bytes, write

import evaluate
import prepare_tiny_sd
from common.contract import TINY_SD, read_distillation
from common.judging import metrics, results
from common.judging.metrics import ClipJudge, SceneReader
from common.small_models import build_tokenizer
from common.teacher_data import Pictures
from common.teacher_objectives import ClipObjective

PARTS = ("reader", "clip", "vae", "unet", "decoder")
CAPTIONS = [f"a photo of a {name}" for name in ("bag", "boot", "coat")]


def quick(data, folder, *more):
    steps = [word for part in PARTS for word in (f"--{part}_steps", 2)]
    small = ["--block_out_channels", 8, 8, 8, "--layers_per_block", 1, "--vae_block_out_channels", 8, 8, 8]
    few = ["--latents", 20, "--guidance_captions", 2, "--report_captions", 4]
    return ["--data_dir", data, "--output_dir", folder, *steps, *small, *few, *more]


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """30 training and 6 test pictures of 28 pixels in MNIST's format, of three classes with names."""
    folder = tmp_path_factory.mktemp("mnist")
    write_idx(folder)
    write_idx(folder, "t10k", 6, packed=True, seed=1)
    (folder / "labels.txt").write_text("bag\nboot\ncoat\n")
    return folder


@pytest.fixture(scope="module")
def trained(mnist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    test_file = mnist / "t10k-images-idx3-ubyte.gz"
    run_in_process(prepare_tiny_sd, *quick(mnist, folder, "--eval_data_dir", test_file))
    return folder


def test_the_teacher_opens_in_stock_diffusers(trained):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(trained / "teacher")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.num_train_timesteps == 1000
    assert pipeline.scheduler.config.prediction_type == "epsilon" and pipeline.unet.config.sample_size == 8
    assert pipeline(CAPTIONS, num_inference_steps=2, output_type="np").images.shape == (3, 32, 32, 3)
    for caption in CAPTIONS:  # every word is one token
        assert len(pipeline.tokenizer(caption).input_ids) == 5 + 2
    contract = read_distillation(trained / "teacher")
    guidance = read_json(trained / "work/guidance.json")
    assert contract["guidance"] == "cfg" and contract["method"] == "prepare_tiny_sd"
    assert guidance[str(contract["guidance_scale"])] == min(guidance.values())


def test_its_judges_judge(trained, mnist, tmp_path):
    rows = read_json(trained / "work/report.json")
    assert {"real pictures", "VAE reconstructions", "psnr"} < rows.keys()
    assert {"class_accuracy", "r_precision", "clip_score", "frechet"} <= rows["real pictures"].keys()
    assert SceneReader.from_pretrained(trained / "reader").captions == CAPTIONS
    judges = ["--clip_model", trained / "clip", "--reader", trained / "reader"]
    data = ["--data_dir", mnist / "t10k-images-idx3-ubyte.gz", "--num_images", 3, "--cache_dir", tmp_path / "cache"]
    models = ["--models", trained / "teacher", "--steps", 2, 1, "--output_dir", tmp_path / "out"]
    run_in_process(evaluate, *models, *data, *judges)
    for row in read_json(tmp_path / "out/results.json")["configurations"]:
        assert 0 <= row["class_accuracy"] <= 1 and row["frechet_clip"] > 0 and "scene_accuracy" not in row
    assert (tmp_path / "out/quality_steps.png").is_file()


def test_a_second_run_trains_nothing_and_longer_ones_go_on(trained, mnist, capsys):
    weights = {file: file.read_bytes() for file in trained.glob("*/**/*.safetensors") if "work" not in file.parts}
    capsys.readouterr()
    run_in_process(prepare_tiny_sd, *quick(mnist, trained, "--parts", *PARTS))
    said = capsys.readouterr().out
    assert "loss" not in said and all(f"{part}: resuming at step 2 of 2" in said for part in PARTS)
    assert weights == {file: file.read_bytes() for file in weights}
    run_in_process(prepare_tiny_sd, *quick(mnist, trained, "--parts", "decoder", "--decoder_steps", 3))
    assert "decoder: resuming at step 2 of 3" in capsys.readouterr().out


def test_other_data_do_not_mix_with_a_begun_work_folder(trained, mnist, tmp_path, capsys):
    write_idx(tmp_path, seed=9)
    error = error_of(prepare_tiny_sd, quick(tmp_path, trained), capsys)
    assert "belongs to a run with other arguments: data_dir was" in error and error.count("\n") == 1
    error = error_of(prepare_tiny_sd, quick(mnist, trained, "--resolution", 40), capsys)
    assert "resolution was 32, now 40" in error


def test_captions_that_are_no_classes_and_a_given_vae(tmp_path, capsys):
    for number in range(6):
        write(tmp_path / f"data/{number}.png", image_bytes((40 * number, 0, 0)))
        write(tmp_path / f"data/{number}.txt", f"picture number {number}")
    more = ["--vae_path", TINY_SD, "--parts", "reader", "clip", "unet"]
    run_in_process(prepare_tiny_sd, *quick(tmp_path / "data", tmp_path / "out", *more))
    assert "No reader: the captions are no classes" in capsys.readouterr().out
    assert not (tmp_path / "out/reader").exists() and not (tmp_path / "out/work/vae").exists()
    assert ClipJudge(tmp_path / "out/clip").text_features(["picture number 1"]).shape == (1, 96)
    kept = load_file(next((tmp_path / "out/work").glob("latents-*")))
    scaling = json.loads((TINY_SD / "vae/config.json").read_text())["scaling_factor"]
    assert str(scaling) in next((tmp_path / "out/work").glob("latents-*")).name  # as given
    assert kept["latents"].shape == (6, 4, 8, 8) and kept["labels"].tolist() == [[number] for number in range(6)]


def pictures(folder, **changes):
    flags = dict.fromkeys(("image_column", "caption_column", "caption_template", "max_train_samples"))
    return Pictures(SimpleNamespace(**{**flags, "resolution": 32, "seed": 0, **changes}), str(folder))


def test_every_epoch_reads_every_picture_in_another_order(mnist):
    source = pictures(mnist)
    epochs = [[source.order(0, index, 30) for index in range(30 * epoch, 30 * epoch + 30)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(30)) and epochs[0] != epochs[1]
    pixels, captions, labels = source.samples(0, range(4))
    assert pixels.shape == (4, 3, 32, 32) and captions == [source.captions[place] for place in epochs[0][:4]]
    assert [source.caption_of(label) for label in labels] == captions
    assert source.kept(4) == [0, 9, 19, 29] and source.classes == CAPTIONS


def test_captions_alike_are_not_told_apart(mnist):
    """One class alone in a batch: nothing is contrasted, and only the head's loss is left."""
    source = pictures(mnist)
    objective = ClipObjective(build_tokenizer(source.captions), source=source)
    objective.heads.clear()
    of_one_class = [i for i in range(30) if source.captions[source.order(0, i, 30)] == CAPTIONS[0]]
    assert objective(0, 0, of_one_class[:4], "cpu") == 0
    assert objective(0, 0, range(8), "cpu") > 0.1


def test_class_accuracy(tmp_path):
    class Fake(torch.nn.Module):
        captions, size = CAPTIONS, 4

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, pixels):
            return {"caption": pixels[:, :, 0, 0]}

    pixels = torch.zeros(70, 3, 8, 8)
    for index in range(70):
        pixels[index, index % 3] = 1
    captions = [CAPTIONS[index % 3] for index in range(69)] + [CAPTIONS[1]]
    assert metrics.class_accuracy(Fake(), pixels, captions).tolist() == [True] * 69 + [False]
    with pytest.raises(ValueError, match="'a dog'"):
        metrics.class_accuracy(Fake(), pixels[:1], ["a dog"])
    reader = SceneReader(8, CAPTIONS, 20)
    reader.save_pretrained(tmp_path)
    loaded = SceneReader.from_pretrained(tmp_path)
    assert loaded(torch.zeros(2, 3, 20, 20))["caption"].shape == (2, 3) and loaded.captions == CAPTIONS
    assert list(metrics.read_back(loaded, pixels[:2], captions[:2])) == ["class_accuracy"]


def test_a_class_reader_judges_its_own_captions_alone(tmp_path, capsys):
    SceneReader(8, CAPTIONS, 32).save_pretrained(tmp_path)
    assert results.load_judges("none", str(tmp_path), CAPTIONS[:2], "cpu")[1].captions == CAPTIONS
    assert results.load_judges("none", str(tmp_path), [CAPTIONS[0], "a dog"], "cpu") == (None, None)
    assert "--reader knows 3 captions, and not 'a dog'" in capsys.readouterr().out


def test_every_flag_has_help(monkeypatch):
    assert_every_flag_has_help(prepare_tiny_sd, monkeypatch)


MISTAKES = [
    (["--resolution", 28], "--resolution 28 is no multiple of 8"),
    (["--block_out_channels", 8, 12, 8], "--block_out_channels 8 12 8: multiples of 8 only"),
    (["--parts", "unet"], "--parts unet: vae comes before it"),
    (["--data_dir", "{mnist}/nowhere"], "nowhere does not exist"),
    (["--eval_data_dir", "{mnist}/nowhere"], "--eval_data_dir"),
    (["--max_train_samples", 1], "holds one picture"),
    (["--vae_path", "{mnist}"], "--vae_path"),
]


@pytest.mark.parametrize("wrong, said", MISTAKES, ids=[str(wrong[0]) for wrong, _ in MISTAKES])
def test_mistakes_are_one_sentence(mnist, tmp_path, capsys, wrong, said):
    wrong = [str(word).replace("{mnist}", str(mnist)) for word in wrong]
    error = error_of(prepare_tiny_sd, quick(mnist, tmp_path, *wrong), capsys)
    assert said in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "work").exists()


def test_flags_of_pictures_without_any_are_refused(capsys):
    error = error_of(prepare_tiny_sd, ["--resolution", 64], capsys)
    assert "--resolution is about pictures of one's own" in error
