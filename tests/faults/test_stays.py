"""What works with the files and machines that people have, and must go on working."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT, environment, fork, read_json, run_in_process
from launching import SHAPES, each, flags, quick, wait_for
from PIL import Image
from test_data import image_bytes, load, write
from transformers import CLIPTokenizer

import evaluate
import inference
import train_guided
from common.checkpoint import checkpoints_in
from common.pipelines import load_pipeline
from common.run import Run
from common.stopping import STOPPED

SCRIPT = ROOT / "train_guided.py"
SCHEDULERS = {
    "Euler": "EulerDiscreteScheduler",
    "Euler a": "EulerAncestralDiscreteScheduler",
    "DPM++": "DPMSolverMultistepScheduler",
    "UniPC": "UniPCMultistepScheduler",
    "LCM": "LCMScheduler",
    "DDIM": "DDIMScheduler",
}


def first_loss(monkeypatch, *arguments):
    found, count = [], Run.count

    def spy(run, *given, **options):
        count(run, *given, **options)
        found.append(run.logs["loss"])

    with monkeypatch.context() as patch:
        patch.setattr(Run, "count", spy)
        run_in_process(train_guided, *arguments)
    return found[0]


def with_model(pipelines, folder, model, *more):
    return [model if word == pipelines() else word for word in quick(pipelines, folder, *more, steps=1)]


# Models


@each(SCHEDULERS, "a model that came with the scheduler of {}", "the same noise schedule, so the same loss")
def test_schedulers_of_one_noise_schedule_give_one_loss(pipelines, tmp_path, monkeypatch, case):
    plain = first_loss(monkeypatch, *quick(pipelines, tmp_path / "a", steps=1))
    pipeline = load_pipeline(pipelines())
    kind = getattr(diffusers, SCHEDULERS[case])
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "model")
    assert first_loss(monkeypatch, *with_model(pipelines, tmp_path / "b", tmp_path / "model")) == plain


@pytest.mark.fault("v-prediction at zero terminal SNR", "finite")
def test_v_prediction_at_zero_snr_is_finite(pipelines, tmp_path, monkeypatch):
    pipeline = load_pipeline(pipelines("v"))
    config = {**pipeline.scheduler.config, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(config)
    pipeline.save_pretrained(tmp_path / "model")
    assert np.isfinite(first_loss(monkeypatch, *with_model(pipelines, tmp_path / "run", tmp_path / "model")))


@pytest.mark.fault("weights in shards", "read whole")
def test_sharded_weights_train_alike(pipelines, tmp_path, monkeypatch):
    pipeline = load_pipeline(pipelines())
    pipeline.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    assert len(list((tmp_path / "model/unet").glob("*.safetensors"))) > 1
    plain = first_loss(monkeypatch, *quick(pipelines, tmp_path / "a", steps=1))
    assert first_loss(monkeypatch, *with_model(pipelines, tmp_path / "b", tmp_path / "model")) == plain


@pytest.mark.fault("tokens of textual inversion", "they train and are saved")
def test_added_tokens_go_into_the_output(pipelines, tmp_path):
    pipeline = load_pipeline(pipelines())
    pipeline.tokenizer.add_tokens(["<cat-toy>"])
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer))
    pipeline.save_pretrained(tmp_path / "model")
    run_in_process(train_guided, *with_model(pipelines, tmp_path / "run", tmp_path / "model"))
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "run/final/tokenizer")
    assert "<cat-toy>" in tokenizer.get_vocab()
    diffusers.DiffusionPipeline.from_pretrained(tmp_path / "run/final", dtype=torch.float32)


@pytest.mark.fault("captions of more tokens than the encoder has", "cut, with one warning")
def test_long_captions_are_cut_with_one_warning(pipelines, tmp_path, caplog):
    write(tmp_path / "data/a.png", image_bytes(size=(32, 32)))
    write(tmp_path / "data/a.txt", "a red ring " * 40)
    arguments = [word for word in quick(pipelines, tmp_path / "run", steps=2) if word not in SHAPES]
    run_in_process(train_guided, *arguments, "--data_dir", tmp_path / "data")
    assert caplog.text.count("truncated because CLIP") <= 1


# Data


@pytest.mark.fault("a picture of one pixel; --data_dir itself a link", "they train")
def test_one_pixel_behind_a_linked_root(tmp_path):
    write(tmp_path / "real/a.png", image_bytes(size=(1, 1)))
    write(tmp_path / "real/a.txt", "a")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert load(tmp_path / "link")[0, 0, 0]["pixel_values"].shape == (3, 16, 16)


@pytest.mark.fault("a batch and workers larger than the data", "the data repeats")
def test_a_batch_larger_than_the_data(pipelines, tmp_path):
    write(tmp_path / "data/a.png", image_bytes(size=(32, 32)))
    write(tmp_path / "data/a.txt", "a ring")
    arguments = [word for word in quick(pipelines, tmp_path / "run", steps=1) if word not in SHAPES]
    run_in_process(train_guided, *arguments, "--data_dir", tmp_path / "data", "--dataloader_num_workers", 3)
    assert checkpoints_in(tmp_path / "run")


# Use


@pytest.mark.fault("SIGTERM to the whole process group", "one checkpoint, status 75")
def test_sigterm_to_the_group(pipelines, tmp_path):
    arguments = flags(pipelines, "train_guided", tmp_path / "run", "--batch_size", 2, steps=100000)
    process = fork(SCRIPT, *arguments, processes=2, output=tmp_path / "said.txt")
    wait_for((tmp_path / "run/checkpoint-2/state.json").is_file, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == STOPPED


@pytest.mark.fault("an empty newest checkpoint", "not one: the last that is complete is used")
def test_an_empty_newest_checkpoint(pipelines, tmp_path, capsys):
    run_in_process(train_guided, *flags(pipelines, "train_guided", tmp_path, steps=2))
    (tmp_path / "checkpoint-3").mkdir()
    run_in_process(
        train_guided, *flags(pipelines, "train_guided", tmp_path, "--resume_from_checkpoint", "latest", steps=3)
    )
    assert "checkpoint-2" in capsys.readouterr().out and checkpoints_in(tmp_path)[-1][0] == 3


@pytest.mark.fault("a run's name with spaces and emoji, a strict umask", "written as named")
def test_names_and_umask(pipelines, tmp_path):
    before = os.umask(0o077)
    try:
        run_in_process(train_guided, *quick(pipelines, tmp_path, "--run_name", "mein Läufer 🏃", steps=1))
    finally:
        os.umask(before)
    assert (tmp_path / "mein Läufer 🏃/final/model_index.json").is_file()


@pytest.mark.fault("stdin and stdout closed", "it trains")
def test_closed_stdin_and_stdout(pipelines, tmp_path):
    command = [sys.executable, SCRIPT, *map(str, quick(pipelines, tmp_path / "run", steps=1))]
    closed = ["bash", "-c", '"$@" <&- >&-', "bash", *command]
    ended = subprocess.run(closed, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert (tmp_path / "run/final").is_dir()


# Judging


@pytest.mark.fault("folders of images of mixed sizes; a cut one among them", "judged; the cut one is named")
def test_mixed_sizes_are_judged_and_a_cut_image_is_named(tmp_path, capsys):
    from launching import error_of

    for number, size in enumerate([(32, 32), (40, 64), (90, 33)]):
        write(tmp_path / f"images/{number}.png", image_bytes((40 * number, 9, 9), size))
    given = ["--models", tmp_path / "images", "--prompts_file", tmp_path / "p.txt", "--output_dir", tmp_path / "out"]
    given += ["--clip_model", ROOT / "assets/tiny-clip"]
    (tmp_path / "p.txt").write_text("a ring\na cross\na square\n")
    run_in_process(evaluate, *given)
    assert read_json(tmp_path / "out/results.json")["configurations"][0]["clip_score"] >= 0
    write(tmp_path / "images/more/4.png", image_bytes())
    run_in_process(evaluate, *given)
    assert "1 images in its folders are not taken, e.g." in capsys.readouterr().out
    (tmp_path / "images/1.png").write_bytes(image_bytes(size=(64, 64))[:40])
    assert "1.png can't be read as an image" in error_of(evaluate, given, capsys)


@pytest.mark.fault("--init_image that is transparent, turned, or no picture", "as training opens it, or a sentence")
def test_init_images(tmp_path, capsys):
    from launching import error_of

    Image.new("RGBA", (40, 64), (9, 9, 9, 0)).save(tmp_path / "a.png")
    shutil.copy(__file__, tmp_path / "b.png")
    given = ["--prompt", "a ring", "--steps", 2, "--output_dir", tmp_path / "o", "--clip_model", "none"]
    run_in_process(inference, *given, "--reader", "none", "--init_image", tmp_path / "a.png")
    assert len(list(Path(tmp_path / "o/images").rglob("*.png"))) == 1
    error = error_of(inference, [*given, "--init_image", tmp_path / "b.png"], capsys)
    assert "--init_image" in error and "b.png can't be used" in error
