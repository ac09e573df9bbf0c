"""inference.py on a tiny pipeline and LoRA of random weights: one real launch, stock diffusers, user's mistakes."""

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, read_json, run_in_process, save_random_lora
from diffusers import DDIMScheduler, DiffusionPipeline, LCMScheduler
from launching import error_of
from PIL import Image

import inference
import prepare_tiny_sd
from common import shapes
from common.contract import write_distillation
from common.errors import UsageError
from common.judging import results
from common.judging.metrics import ClipJudge, SceneReader
from common.randomness import sample_generator
from common.schedulers import scheduler_for

PROMPTS = shapes.held_out_captions(2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """tiny-sd's architecture, a LoRA as train_flash_lora.py writes it, and the judges: random weights."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer = prepare_tiny_sd.build_tokenizer()
    vae = prepare_tiny_sd.VaeObjective().model.to(memory_format=torch.contiguous_format)
    pipeline = prepare_tiny_sd.build_pipeline(prepare_tiny_sd.UNetObjective(tokenizer), vae)
    pipeline.save_pretrained(root / "assets/tiny-sd")
    write_distillation(root / "assets/tiny-sd", guidance="cfg", guidance_scale=3.0)
    prepare_tiny_sd.ClipObjective(tokenizer).model.save_pretrained(root / "clip")
    tokenizer.save_pretrained(root / "clip")
    SceneReader(8).save_pretrained(root / "reader")
    save_random_lora(pipeline, root / "final", str(root / "assets/tiny-sd"), alpha=16)
    Image.new("RGB", (40, 50), "orange").save(root / "init.png")
    return root


def run(folders, outdir, *flags):
    """inference.py in this process."""
    defaults = ["--clip_model", "none", "--reader", "none", "--output_dir", str(outdir), "--device", "cpu"]
    inference.main(inference.parse_args([*defaults, *map(str, flags)]))
    return json.loads((Path(outdir) / "results.json").read_text())["configurations"]


@pytest.fixture(scope="module")
def launched(folders, tmp_path_factory):
    """One launch of the script: student and undistilled teacher at 1 and 2 steps, baseline at 3."""
    outdir = tmp_path_factory.mktemp("launch") / "out"
    result = subprocess.run(
        [
            sys.executable,
            str(ROOT / "inference.py"),
            "--lora_path",
            str(folders / "final"),
            "--prompt",
            *PROMPTS,
            "--steps",
            "1",
            "2",
            "--num_images",
            "2",
            "--compare_baseline",
            "--baseline_steps",
            "3",
            "--seed",
            "5",
            "--clip_model",
            str(folders / "clip"),
            "--preference_model",
            str(folders / "clip"),
            "--reader",
            str(folders / "reader"),
            "--output_dir",
            str(outdir),
            "--device",
            "cpu",
        ],
        capture_output=True,
        text=True,
        cwd=outdir.parent,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    return outdir, result.stdout


NAMES = [
    "teacher 3 steps w=3",
    "teacher 1 steps w=3 (undistilled)",
    "teacher 2 steps w=3 (undistilled)",
    "student 1 steps",
    "student 2 steps",
]


def images_of(outdir, configuration):
    files = sorted((outdir / "images" / inference.slug(configuration)).iterdir())
    return np.stack([np.asarray(Image.open(file)) for file in files])


def test_files_of_a_launch(launched):
    outdir, stdout = launched
    assert {path.name for path in outdir.iterdir()} == {
        "images",
        "grid_steps.png",
        "grid_comparison.png",
        "results.csv",
        "results.json",
    }
    assert {path.name for path in (outdir / "images").iterdir()} == {inference.slug(name) for name in NAMES}
    for name in NAMES:
        assert images_of(outdir, name).shape == (4, 32, 32, 3)
    steps, comparison = (Image.open(outdir / f"grid_{name}.png") for name in ("steps", "comparison"))
    assert comparison.height == steps.height and comparison.width == steps.width + 3 * 100
    # It says where scheduler, timesteps and guidance come from, and prints the table.
    assert "Scheduler: saved with" in stdout and "alpha 16" in stdout and "guidance_scale 1" in stdout
    assert "1 steps of LCMScheduler at [999] (trained for 2 steps: [999, 499])" in stdout
    table = stdout[stdout.index("configuration  ") :]
    assert [line for name in NAMES for line in table.splitlines() if line.startswith(name + "  ")]
    assert "Traceback" not in stdout


def test_csv_and_json_of_a_launch(launched, folders):
    outdir, _ = launched
    with open(outdir / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["configuration"], r["prompt"]) for r in rows] == [(n, p) for n in NAMES for p in ["all", *PROMPTS]]
    assert list(rows[0]) == list(results.COLUMNS)
    for row in rows:
        whole = row["prompt"] == "all"
        assert row["images"] == ("4" if whole else "2") and row["batch_size"] == "64"
        assert 0 < float(row["seconds_per_image_without_decode"]) < float(row["seconds_per_image"])
        assert float(row["speedup"]) > 0 and float(row["peak_memory_mib"]) > 0 and "RSS" in row["peak_memory_kind"]
        assert 0 <= float(row["clip_score"]) <= 100 and 0 <= float(row["scene_accuracy"]) <= 1
        assert bool(row["clip_score_low"]) == whole and row["frechet_clip"] == ""
        base = next(r for r in rows if r["role"] == "baseline" and r["prompt"] == row["prompt"])
        assert float(row["speedup"]) == pytest.approx(
            float(base["seconds_per_image"]) / float(row["seconds_per_image"])
        )
        if float(base["clip_score"]):
            kept = float(row["clip_score"]) / float(base["clip_score"])
            assert float(row["clip_score_retention"]) == pytest.approx(kept)
    report = json.loads((outdir / "results.json").read_text())
    assert report["seed"] == 5 and "torch" in report["manifest"]["versions"] and report["resolution"] == 32
    assert [entry["configuration"] for entry in report["configurations"]] == NAMES
    manifest, model = report["manifest"], folders / "assets/tiny-sd"
    assert manifest["seed"] == 5 and manifest["captions"]["count"] == 2
    assert set(manifest["judges"]) == {"clip", "reader", "preference"}
    assert manifest["judges"]["clip"]["image_size"] == 32
    assert [source["path"] for source in manifest["models"]] == [str(model), str(folders / "final")]
    for source in [*manifest["models"], *manifest["judges"].values()]:
        files = {str(file.relative_to(source["path"])): file for file in Path(source["path"]).rglob("*.safetensors")}
        hashes = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}
        assert source["sha256"] == hashes and hashes
    assert report["configurations"][2]["timesteps"] == [999, 499] and report["configurations"][-1]["steps"] == 2
    for entry, row in zip(report["configurations"], rows[::3]):
        assert entry["seconds_per_image"] == float(row["seconds_per_image"]) and len(entry["per_prompt"]) == 2
        assert len(entry["files"]) == 4 and all((outdir / file).is_file() for file in entry["files"])


def test_preference_of_images_over_the_baselines(launched, folders):
    """Of each image over the baseline's of its caption and noise, though the student is judged before the baseline."""
    report = read_json(launched[0] / "results.json")
    assert report["preference_model"] == str(folders / "clip") == report["manifest"]["judges"]["preference"]["path"]
    judge, captions = ClipJudge(folders / "clip"), [prompt for prompt in PROMPTS for _ in range(2)]
    tokens, scores = judge.tokenizer(captions, padding="max_length", return_tensors="pt"), []
    for row in report["configurations"]:
        pixels = torch.from_numpy(images_of(launched[0], row["configuration"])).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.no_grad():
            logits = judge.model(pixel_values=judge.preprocess(pixels), **tokens).logits_per_image
        scores.append(logits.diagonal())
        assert row["preference"] == pytest.approx(scores[-1].mean().item(), rel=1e-4)
        assert row["preference_low"] <= row["preference"] <= row["preference_high"]
        won = (scores[-1] > scores[0]).double() + (scores[-1] == scores[0]).double() / 2
        assert row["preference_win"] == won.mean() and (row["role"] != "baseline" or won.mean() == 0.5)
    assert len({row["preference"] for row in report["configurations"]}) == len(NAMES)


def test_student_is_not_the_teacher(launched):
    for steps in (1, 2):
        teacher = images_of(launched[0], f"teacher {steps} steps w=3 (undistilled)")
        assert not np.array_equal(teacher, images_of(launched[0], f"student {steps} steps"))
    first = images_of(launched[0], "student 2 steps")
    assert len(np.unique(first.reshape(4, -1), axis=0)) == 4


def test_student_images_are_those_of_stock_diffusers(launched, folders):
    pipeline = DiffusionPipeline.from_pretrained(folders / "assets/tiny-sd")
    pipeline.load_lora_weights(folders / "final")
    pipeline.scheduler = LCMScheduler.from_pretrained(folders / "final", subfolder="scheduler")
    pipeline.set_progress_bar_config(disable=True)
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    for steps in (1, 2):
        generators = [sample_generator(5, i, j) for i in range(2) for j in range(2)]
        stock = pipeline(prompts, num_inference_steps=steps, guidance_scale=1, generator=generators).images
        # Another process may sum in another order: a rounding step of one level.
        assert np.abs(images_of(launched[0], f"student {steps} steps").astype(int) - np.stack(stock)).max() <= 1


def test_batches_scale_and_second_run(folders, tmp_path):
    flags = ["--lora_path", folders / "final", "--prompt", *PROMPTS, "one more"]
    (whole,) = run(folders, tmp_path, *flags)
    assert whole["configuration"] == "student 2 steps" and "clip_score" not in whole and "speedup" not in whole
    kept = images_of(tmp_path, "student 2 steps")
    (again,) = run(folders, tmp_path, *flags, "--batch_size", 2, "--save_images", 2)  # into the same folder
    assert len(again["files"]) == 2 and again["batch_size"] == 2
    assert np.abs(images_of(tmp_path, "student 2 steps").astype(int) - kept[:2]).max() <= 1
    assert np.array_equal(images_of(tmp_path / "earlier-1", "student 2 steps"), kept)  # nothing mixes, nothing is lost
    memory = ["--attention_slicing", "--vae_slicing", "--vae_tiling"]
    run(folders, tmp_path / "memory", *flags, *memory)
    assert np.abs(images_of(tmp_path / "memory", "student 2 steps").astype(int) - kept).max() <= 1
    run(folders, tmp_path / "off", *flags, "--lora_scale", 0)
    assert not np.array_equal(images_of(tmp_path / "off", "student 2 steps"), kept)
    run(folders, tmp_path / "fused", *flags, "--fuse_lora")
    assert np.abs(images_of(tmp_path / "fused", "student 2 steps").astype(int) - kept).max() <= 2


def test_image_to_image(folders, tmp_path):
    captions = tmp_path / "captions.json"
    flags = [
        "--lora_path",
        folders / "final/pytorch_lora_weights.safetensors",
        "--prompts_file",
        captions,
        "--steps",
        2,
        "--pretrained_model_name_or_path",
        folders / "assets/tiny-sd",
    ]
    captions.write_text(json.dumps([{"text": prompt} for prompt in PROMPTS]))
    run(folders, tmp_path / "without", *flags)
    baseline = ["--compare_baseline", "--baseline_steps", 2, "--negative_prompt", "blur", "--dtype", "bf16"]
    start = ["--init_image", folders / "init.png", "--strength", 0.5]
    *teachers, row = run(folders, tmp_path / "with", *flags, *baseline, *start)
    assert [teacher["role"] for teacher in teachers] == ["baseline", "undistilled"]
    assert row["scheduler"] == "LCMScheduler" and row["timesteps"] == [999, 499]
    one, other = images_of(tmp_path / "with", "student 2 steps"), images_of(tmp_path / "without", "student 2 steps")
    assert one.shape == other.shape and not np.array_equal(one, other)


def test_the_recorded_variant_of_the_parent_is_taken_without_a_flag(folders, tmp_path):
    """A LoRA, and a whole student's teacher, whose parent is saved as variant fp16 alone; another model has none."""
    parent, lora, student = (tmp_path / name for name in ("parent", "lora", "student"))
    DiffusionPipeline.from_pretrained(folders / "assets/tiny-sd").save_pretrained(parent, variant="fp16")
    shutil.copytree(folders / "final", lora)
    contract = {**read_json(lora / "distillation.json"), "parent": str(parent), "variant": "fp16"}
    write_distillation(lora, **contract)
    flags = ["--lora_path", lora, "--prompt", *PROMPTS]
    rows = run(folders, tmp_path / "out", *flags, "--compare_baseline", "--baseline_steps", 1)
    assert [row["role"] for row in rows] == ["baseline", "undistilled", "student"]
    report = read_json(tmp_path / "out/results.json")
    assert (report["model"], report["variant"], report["teacher"]) == (str(parent), "fp16", str(parent))
    run(folders, tmp_path / "plain", *flags, "--pretrained_model_name_or_path", folders / "assets/tiny-sd")
    assert np.array_equal(*(images_of(tmp_path / name, "student 2 steps") for name in ("out", "plain")))
    shutil.copytree(folders / "assets/tiny-sd", student)
    write_distillation(student, **contract)
    flags = ["--pretrained_model_name_or_path", student, "--prompt", *PROMPTS, "--compare_baseline"]
    assert len(run(folders, tmp_path / "student-out", *flags, "--baseline_steps", 1)) == 3


def test_the_folder_has_an_alias(folders, tmp_path):
    flags = ["--lora_path", folders / "final", "--prompt", PROMPTS[0], "--steps", 1, "--clip_model", "none"]
    run_in_process(inference, *flags, "--reader", "none", "--outdir", tmp_path / "out", "--device", "cpu")
    assert (tmp_path / "out/results.json").is_file()


def test_held_out_captions_have_a_frechet_distance(folders, tmp_path, monkeypatch):
    real_features = inference.metrics.shapes_real_features
    monkeypatch.setattr(inference, "MIN_FRECHET_IMAGES", 4)
    monkeypatch.setattr(inference.metrics, "shapes_real_features", lambda clip, split: real_features(clip, 8, split))
    (row,) = run(
        folders,
        tmp_path,
        "--pretrained_model_name_or_path",
        folders / "assets/tiny-sd",
        "--steps",
        1,
        "--held_out_captions",
        4,
        "--held_out_split",
        "judge",
        "--clip_model",
        folders / "clip",
        "--guidance_scale",
        2,
    )
    assert row["configuration"] == "model 1 steps w=2" and row["frechet_clip"] > 0 and row["images"] == 4
    prompts = [each["prompt"] for each in row["per_prompt"]]
    assert prompts == shapes.held_out_captions(4, "judge") != shapes.held_out_captions(4)
    assert read_json(tmp_path / "results.json")["manifest"]["captions"]["held_out_split"] == "judge"


@pytest.fixture(scope="module")
def baked(folders):
    """A whole pipeline with its guidance baked in, for 2 steps of target `next`."""
    path = folders / "baked"
    path.mkdir()
    for entry in (folders / "assets/tiny-sd").iterdir():
        (path / entry.name).symlink_to(entry)
    (path / "distillation.json").unlink()
    write_distillation(
        path,
        guidance="baked",
        guidance_scale=1.0,
        steps=2,
        timesteps=[999, 499],
        target="next",
        parent=str(folders / "assets/tiny-sd"),
    )
    return path


def test_distilled_pipeline_and_its_parent(folders, baked, tmp_path):
    rows = run(
        folders,
        tmp_path,
        "--pretrained_model_name_or_path",
        baked,
        "--prompt",
        PROMPTS[0],
        "--steps",
        3,
        "--compare_baseline",
        "--baseline_steps",
        2,
    )
    assert [row["configuration"] for row in rows] == [
        "teacher 2 steps w=3",
        "teacher 3 steps w=3 (undistilled)",
        "student 3 steps",
    ]
    # 3 does not divide 1000: the first-order twin of DDIM takes its place.
    assert [row["scheduler"] for row in rows] == ["DDIMScheduler", *["DPMSolverMultistepScheduler"] * 2]
    assert rows[-1]["timesteps"] == rows[1]["timesteps"] and rows[-1]["guidance_scale"] == 1


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--lora_path", "{models}/nowhere/final"], "no such file"),
        (["--lora_path", "{models}"], "holds no LoRA to load (did you mean"),
        (["--lora_path", "{models}/init.png"], ".safetensors"),
        (["--lora_path", "{models}/final", "--scheduler", "ddim"], "leave the flag out"),
        (["--lora_path", "{models}/final", "--guidance_scale", "3"], "guided twice"),
        (["--pretrained_model_name_or_path", "{baked}", "--guidance_scale", "2"], "guided twice"),
        (["--lora_path", "{models}/final", "--negative_prompt", "blur"], "--negative_prompt"),
        (["--lora_path", "{models}/final", "--prompts_file", "{models}/none.txt"], "none.txt can't be read"),
        (["--lora_path", "{models}/final", "--prompts_file", "{models}/empty.txt"], "has no prompt"),
        (
            ["--lora_path", "{models}/final", "--prompts_file", "{models}/final/distillation.json"],
            "not a list of captions",
        ),
        (["--lora_path", "{models}/final", "--init_image", "{models}/none.png"], "none.png"),
        (["--lora_path", "{models}/final", "--strength", "0.5"], "--init_image"),
        (
            ["--lora_path", "{models}/final", "--init_image", "{models}/init.png", "--strength", "1.5"],
            "--strength 1.5",
        ),
        (
            ["--lora_path", "{models}/final", "--init_image", "{models}/init.png", "--strength", "0.4"],
            "leave none to run",
        ),
        (["--lora_path", "{models}/final", "--steps", "2000"], "1000 timesteps"),
        (["--scheduler", "lcm50", "--steps", "4", "51"], "51 steps are more than the 50"),
        (["--pretrained_model_name_or_path", "{models}/nowhere"], "no such folder"),
        (["--pretrained_model_name_or_path", "{models}/clip"], "model_index.json"),
        (["--held_out_captions", "2001"], "--held_out_captions 2001: there are 2000 held-out captions"),
        (
            ["--held_out_captions", "1501", "--held_out_split", "judge"],
            "there are 1500 held-out captions in the split",
        ),
        (["--held_out_split", "judge"], "--held_out_split judge is about --held_out_captions"),
        (["--preference_model", "{models}/nowhere"], "--preference_model: No CLIP judge at '{models}/nowhere'"),
        (["--lora_scale", "0.5"], "--lora_path"),
        (["--resolution", "33"], "multiple of 8"),
        (["--device", "warp"], "no such device"),
        (["--dtype", "fp16"], "needs a GPU"),
        (["--cpu_offload"], "needs a CUDA GPU"),
        (["--output_dir", "{models}/init.png"], "--output_dir {models}/init.png is a file, not a folder"),
        (
            ["--outdir", "{models}/init.png/out"],
            "init.png/out can't be made or written (Not a directory)",
        ),  # an alias,
        (["--output_dir", "/dev/fd"], "--output_dir /dev/fd can't be made or written"),
        (["--clip_model", "{models}/nowhere"], "--clip_model: No CLIP judge at '{models}/nowhere'"),
        (["--clip_model", "{models}/assets/tiny-sd"], "--clip_model: No CLIP judge at '{models}/assets/tiny-sd'"),
        (["--reader", "{models}/nowhere"], "--reader {models}/nowhere: there is no scene reader"),
        (["--reader", "{models}/clip"], "--reader {models}/clip: there is no scene reader"),
        (["--reader", "{models}/clip", "--prompt", "a dog"], "--reader {models}/clip: there is no scene reader"),
    ],
)
def test_mistakes_are_one_sentence(folders, baked, tmp_path, capsys, monkeypatch, flags, sentence):
    monkeypatch.setattr(inference, "load_pipeline", lambda *_, **__: pytest.fail("a pipeline was loaded first"))
    (folders / "empty.txt").write_text("\n \n")
    flags = [flag.format(models=folders, baked=baked) for flag in flags]
    sentence = sentence.format(models=folders)
    before = ["--device", "cpu", "--output_dir", str(tmp_path), "--clip_model", "none", "--reader", "none"]
    error = error_of(inference, [*before, *flags], capsys)
    assert sentence in error and error.startswith("error: ") and error.count("\n") == 1


def test_out_of_gpu_memory_is_one_sentence(folders, tmp_path, capsys, monkeypatch):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(inference, "generate", too_large)
    flags = ["--lora_path", folders / "final", "--clip_model", "none", "--reader", "none", "--device", "cpu"]
    flags += ["--output_dir", tmp_path, "--batch_size", 48]
    error = error_of(inference, flags, capsys).splitlines()[-1]  # after the bars of loading
    assert error.startswith("error: Out of GPU memory at --batch_size 48 and 32 pixels")


@pytest.mark.parametrize("steps, kind", [(50, "DDIM"), (512, "DPMSolverMultistep"), (30, "DPMSolverMultistep")])
def test_a_teacher_on_trailing_timesteps_is_not_stepped_past_them(steps, kind):
    """DDIM steps by 1000 // N: where N does not divide 1000 it would come to other timesteps than the listed ones."""
    teacher = DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    scheduler = scheduler_for(teacher, {"target": None, "steps": None}, steps)
    assert type(scheduler).__name__ == f"{kind}Scheduler"
    leading = DDIMScheduler(timestep_spacing="leading")
    assert scheduler_for(leading, {"target": None, "steps": None}, steps) is leading


def test_batch_size_follows_the_resolution(folders, tmp_path):
    sizes = {resolution: inference.default_batch_size(resolution) for resolution in (32, 64, 72, 512, 520, 1024)}
    assert sizes == {32: 64, 64: 64, 72: 8, 512: 8, 520: 4, 1024: 4}
    flags = ["--lora_path", folders / "final", "--prompt", PROMPTS[0], "--steps", 1, "--resolution", 128]
    assert run(folders, tmp_path, *flags)[0]["batch_size"] == 8
    assert run(folders, tmp_path, *flags, "--batch_size", 64)[0]["batch_size"] == 64


def test_only_default_judges_may_be_missing(folders, tmp_path, capsys, monkeypatch):
    clip, reader = results.load_judges(str(folders / "clip"), str(folders / "reader"), PROMPTS, "cpu")
    assert clip is not None and reader is not None and capsys.readouterr().out == ""
    clip, reader = results.load_judges(str(folders / "clip"), str(folders / "reader"), ["a dog", PROMPTS[0]], "cpu")
    assert clip is not None and reader is None and "not all of these are" in capsys.readouterr().out
    assert results.load_judges(None, None, ["a dog"], "cpu") == (None, None)
    assert capsys.readouterr().out.startswith("No CLIP figures: --clip_model names a judge")
    monkeypatch.setattr(results, "TINY_SD", tmp_path / "tiny-sd")
    assert results.load_judges(None, None, PROMPTS, "cpu") == (None, None)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("No CLIP figures: No CLIP judge at") and lines[1].startswith("No scene accuracy: there")
    assert len(lines) == 2


def test_lcm50_is_how_stock_diffusers_samples_an_lcm_lora(folders, tmp_path, capsys):
    file = folders / "final/pytorch_lora_weights.safetensors"
    flags = ["--lora_path", file, "--pretrained_model_name_or_path", folders / "assets/tiny-sd", "--prompt", *PROMPTS]
    (trailing,) = run(folders, tmp_path / "lcm", *flags)
    assert "Scheduler: LCM on trailing timesteps, the default." in capsys.readouterr().out
    assert trailing["timesteps"] == [999, 749, 499, 249]
    (own,) = run(folders, tmp_path, *flags, "--scheduler", "lcm50")
    assert "Scheduler: LCM on its own grid of 50 timesteps, from --scheduler." in capsys.readouterr().out
    assert own["timesteps"] == [999, 759, 499, 259] and own["scheduler"] == "LCMScheduler"
    pipeline = DiffusionPipeline.from_pretrained(folders / "assets/tiny-sd")
    pipeline.load_lora_weights(file)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    generators = [sample_generator(0, i, 0) for i in range(2)]
    stock = pipeline(PROMPTS, num_inference_steps=4, guidance_scale=1, generator=generators).images
    assert np.abs(images_of(tmp_path, "student 4 steps").astype(int) - np.stack(stock)).max() <= 1


def test_table_of_what_was_measured(capsys):
    """Image folders, say: no times, no steps, other columns."""

    def run_of(name, role, scores):
        return results.rows_of(
            {"configuration": name, "role": role}, {"per_image": {"clip_score": scores}}, {}, ["a", "b"]
        )

    runs = [run_of("one", "baseline", [20, 20, 30, 30]), run_of("other", "student", [20, 20, 15, 15])]
    runs[1][0]["fid"] = 12.5
    results.add_ratios(runs)
    assert [row["clip_score_retention"] for row in runs[1]] == [0.7, 1, 0.5] and runs[1][2]["images"] == 2
    results.print_table(runs, (*results.TABLE, ("FID", "fid", "{:.1f}".format)))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["configuration", "CLIP", "kept", "FID"]
    assert lines[1:] == [["one", "25.0", "100.0%"], ["other", "17.5", "70.0%", "12.5"]]


def test_a_lora_of_another_model_is_refused(folders, tmp_path):
    path = tmp_path / "lora.safetensors"
    inference_weights = {
        "unet.nothing.to_q.lora_A.weight": torch.zeros(2, 8),
        "unet.nothing.to_q.lora_B.weight": torch.zeros(8, 2),
    }
    from safetensors.torch import save_file

    save_file(inference_weights, path)
    with pytest.raises(UsageError, match="--lora_path"):
        run(folders, tmp_path, "--pretrained_model_name_or_path", folders / "assets/tiny-sd", "--lora_path", path)


def test_interruption_keeps_what_was_finished(folders, tmp_path, monkeypatch):
    generate = inference.generate

    def interrupted(pipeline, configuration, *rest):
        if configuration.steps == 2:
            raise KeyboardInterrupt
        return generate(pipeline, configuration, *rest)

    monkeypatch.setattr(inference, "generate", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run(folders, tmp_path, "--lora_path", folders / "final", "--prompt", PROMPTS[0], "--steps", 1, 2)
    assert stopped.value.code == 130
    assert len(json.loads((tmp_path / "results.json").read_text())["configurations"]) == 1


def test_default_prompts_and_outside_defaults(folders):
    assert (ROOT / "prompts/shapes20.txt").read_text().splitlines() == shapes.held_out_captions(20)
    assert len(set((ROOT / "prompts/coco20.txt").read_text().splitlines())) == 20
    args = inference.parse_args(["--lora_path", "jasperai/flash-sd", "--pretrained_model_name_or_path", "some/sd15"])
    inference.check_arguments(args)
    plan = inference.make_plan(args)
    assert (plan.scheduler_from, plan.steps, plan.guidance_scale) == ("flag", [4], 1.0)
    assert inference.read_prompts(args, plan)[0].startswith("A brown dog")
    args = inference.parse_args(["--lora_path", str(folders / "final")])
    assert inference.read_prompts(args, inference.make_plan(args)) == shapes.held_out_captions(20)
