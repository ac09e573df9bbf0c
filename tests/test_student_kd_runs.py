"""train_student_kd.py from start to end: its schedules and projections over a resume, its evaluation, its output."""

import re
import shutil
from functools import partial

import pytest
import torch
from conftest import ROOT, FakeInception, launch, read_json, run_in_process, save_random_vgg16
from contract import assert_contract
from launching import QUICK, SHAPES, assert_same_checkpoints, own_guidance, quick, quick_student
from PIL import Image
from safetensors.torch import load_file

import prepare_unet_small
import train_student_kd
from common.errors import CheckpointError
from common.judging import metrics
from common.judging.evaluation import better
from common.pipelines import load_pipeline
from common.schedulers import ddim_scheduler, student_timesteps

SCRIPT = ROOT / "train_student_kd.py"
# Every schedule at once: all are functions of the step alone.
SCHEDULES = ["--kd_alpha_end", 0.25, "--caption_dropout_end", 0.5, "--chain_schedule", 1000, 500, 20]
SCHEDULES += ["--lr_scheduler", "one_cycle", "--snr_gamma", 5]
NARROW = ("sd_small", (8, 16))  # half the width, no middle block: with projections
assert_same = partial(assert_same_checkpoints, name="student")


@pytest.fixture(scope="module")
def uninterrupted(pipelines, students, tmp_path_factory):
    """Six steps in one go with every schedule, global batch 4, with a checkpoint every third."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    arguments = quick_student(
        pipelines, students("sd", *NARROW), folder, *SCHEDULES, "--checkpointing_steps", 3, steps=6
    )
    run_in_process(train_student_kd, *arguments)
    return folder


# Training


@pytest.mark.parametrize("kind, cut", [("v", ("sd_small", None)), ("sdxl", ("sd_base", None)), ("sd", NARROW)])
def test_every_kind_of_model_trains_and_keeps_the_contract(pipelines, students, tmp_path, kind, cut):
    more = ["--gradient_checkpointing", "--export", "fp16", "--validation_prompts", "a ring", "--validation_steps", 2]
    more += ["--num_validation_images", 1, "--teacher_cpu_offload", "--eval_inference_steps", 2]
    run_in_process(train_student_kd, *quick_student(pipelines, students(kind, *cut), tmp_path, *more, kind=kind))
    final = tmp_path / "final"
    contract = read_json(final / "distillation.json")
    assert contract["method"] == "student_kd" and contract["parent"] == pipelines(kind)
    assert (contract["guidance"], contract["guidance_scale"], contract["steps"]) == ("cfg", own_guidance(kind), None)
    pipeline = load_pipeline(final)
    for steps in (1, 2, 4, 8):
        assert_contract(pipeline, ddim_scheduler(pipeline.scheduler, steps), contract, steps)
    assert read_json(final / "compression.json") == read_json(students(kind, *cut) / "compression.json")
    assert (tmp_path / "samples" / "step-2.png").is_file()
    assert read_json(tmp_path / "final-fp16" / "compression.json") == read_json(final / "compression.json")


def test_a_chain_decides_how_the_output_is_sampled(uninterrupted):
    pipeline, contract = load_pipeline(uninterrupted / "final"), read_json(uninterrupted / "final/distillation.json")
    assert (contract["steps"], contract["target"]) == (20, "next")
    assert contract["timesteps"] == list(range(999, 0, -50))
    assert student_timesteps(pipeline.scheduler, 20) == contract["timesteps"]
    assert_contract(pipeline, pipeline.scheduler, contract, 10)
    assert_contract(pipeline, pipeline.scheduler, contract, 20)


def test_the_default_student_is_sd_small_of_the_teacher(pipelines, tmp_path):
    arguments = quick(pipelines, tmp_path, steps=1)
    run_in_process(train_student_kd, *arguments)
    manifest = read_json(tmp_path / "student" / "compression.json")
    assert manifest["variant"] == "sd_small" and manifest["parent"] == pipelines()
    assert load_pipeline(tmp_path / "final").unet.config.mid_block_type is None
    before = (tmp_path / "student/unet/config.json").stat().st_mtime_ns
    run_in_process(train_student_kd, *arguments, "--max_steps", 2, "--resume_from_checkpoint", "latest")
    assert (tmp_path / "student/unet/config.json").stat().st_mtime_ns == before
    assert (tmp_path / "checkpoint-2").is_dir()


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_the_students_parent_is_the_default_teacher(pipelines, tmp_path, variant):
    """--student_model alone: its distillation.json says which teacher, and which of its files, there is to take."""
    teacher, student = pipelines(), tmp_path / "student"
    made = ["--student_variant", "sd_small", "--output_dir", student]
    if variant:  # no other files than these
        teacher = str(tmp_path / "teacher")
        load_pipeline(pipelines()).save_pretrained(teacher, variant=variant)
        made += ["--variant", variant, "--revision", "main"]
    run_in_process(prepare_unet_small, "--pretrained_model_name_or_path", teacher, *made)
    arguments = ["--student_model", student, "--output_dir", tmp_path / "run", "--max_steps", 1]
    run_in_process(train_student_kd, *QUICK, *SHAPES, *arguments)
    contract = read_json(tmp_path / "run/final/distillation.json")
    assert (contract["parent"], contract["variant"]) == (teacher, variant)
    assert contract["revision"] == ("main" if variant else None)


def test_compiled_is_the_plain_run_under_the_same_names(pipelines, students, uninterrupted, tmp_path, compiled):
    """Features are read out of traced graphs too."""
    arguments = quick_student(pipelines, students("sd", *NARROW), tmp_path, *SCHEDULES, "--torch_compile", steps=6)
    run_in_process(train_student_kd, *arguments)
    assert len(compiled) == 2
    assert_same(tmp_path / "checkpoint-6", uninterrupted / "checkpoint-6", atol=2e-5, rtol=1e-3)


def test_every_trained_weight_moves_and_projections_stay_out_of_the_output(uninterrupted):
    before, after = (load_file(uninterrupted / f"checkpoint-{n}" / "student.safetensors") for n in (3, 6))
    # Eight channels in eight groups: what is added to all of a channel before norm2 is taken away by it, so that
    # nothing but rounding moves it.
    idle = re.compile(r"unet\.(down_blocks\.0|up_blocks\.1)\.resnets\.\d\.(conv1\.bias|time_emb_proj\.(weight|bias))")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(name in moved or idle.fullmatch(name) for name in before) and len(moved) > 0.9 * len(before)
    assert {name.split(".")[1] for name in before if name.startswith("projections.")} == {
        "down_blocks_0",
        "down_blocks_1",
        "up_blocks_0",
        "up_blocks_1",
    }
    ema = load_file(uninterrupted / "checkpoint-6" / "student_ema.safetensors")
    final = load_file(uninterrupted / "final/unet/diffusion_pytorch_model.safetensors")
    assert {f"unet.{name}" for name in final} == {name for name in ema if name.startswith("unet.")}
    assert all(torch.equal(value, ema[f"unet.{name}"]) for name, value in final.items())


def test_resume_is_the_uninterrupted_run_bit_for_bit(pipelines, students, uninterrupted, tmp_path):
    """From another folder's copy of checkpoint-3: what counts is on the disk."""
    shutil.copytree(uninterrupted / "checkpoint-3", tmp_path / "checkpoint-3")
    more = [*SCHEDULES, "--resume_from_checkpoint", "latest"]
    run_in_process(train_student_kd, *quick_student(pipelines, students("sd", *NARROW), tmp_path, *more, steps=6))
    assert_same(tmp_path / "checkpoint-6", uninterrupted / "checkpoint-6")


def test_another_method_is_refused_and_another_length_is_said(pipelines, students, uninterrupted, tmp_path, capsys):
    student = students("sd", *NARROW)
    shutil.copytree(uninterrupted / "checkpoint-3", tmp_path / "checkpoint-3")
    resume = [*SCHEDULES, "--resume_from_checkpoint", "latest"]
    for change in (["--kd_weight", 2], ["--student_model", students("sd", "sd_small")], ["--snr_gamma", 1]):
        with pytest.raises(CheckpointError, match=change[0].strip("-")):
            run_in_process(train_student_kd, *quick_student(pipelines, student, tmp_path, *resume, *change))
    capsys.readouterr()
    run_in_process(train_student_kd, *quick_student(pipelines, student, tmp_path, *resume, steps=4))
    said = "--lr_scheduler one_cycle, --kd_alpha_end, --caption_dropout_end, --chain_schedule was planned for 6 steps"
    assert said in capsys.readouterr().out


# Evaluation


def best_of(checkpoint):
    """The best evaluation so far, as a checkpoint remembers it."""
    return read_json(checkpoint / "state.json")["state"]["best"]


def evaluating(tmp_path):
    """Flags of evaluations of five images, LPIPS with a random trunk among them."""
    trunk = tmp_path / "vgg16.safetensors"
    save_random_vgg16(trunk)
    return ["--eval_steps", 2, "--num_eval_images", 5, "--eval_inference_steps", 2, "--lpips_trunk_path", trunk]


def test_evaluation_leaves_training_bit_identical_and_remembers_the_best(
    pipelines, students, uninterrupted, tmp_path, capsys
):
    more = [*SCHEDULES, *evaluating(tmp_path), "--checkpointing_steps", 3, "--report_to", "tensorboard"]
    arguments = quick_student(pipelines, students("sd", *NARROW), tmp_path / "a", *more, steps=6)
    run_in_process(train_student_kd, *arguments)
    assert_same(tmp_path / "a/checkpoint-6", uninterrupted / "checkpoint-6")
    said = capsys.readouterr().out
    assert said.count("Evaluation at step") == 3 and "frechet_clip" in said and "clip_score" in said
    assert "lpips_teacher" in said and "scene_accuracy" in said and "fid" not in said
    best = best_of(tmp_path / "a/checkpoint-6")
    assert best["metric"] == "frechet_clip" and best["step"] in (2, 4, 6)
    card = (tmp_path / "a/best/README.md").read_text()
    assert f"| frechet_clip, 5 images | {best['value']:.4f} |" in card
    assert f"| optimizer steps | {best['step']} |" in card
    load_pipeline(tmp_path / "a/best")
    assert not list((tmp_path / "a").rglob("*.png")) and list((tmp_path / "a/logs").rglob("events*"))
    # A resumed run knows the best.
    shutil.copytree(tmp_path / "a/checkpoint-3", tmp_path / "b/checkpoint-3")
    arguments[arguments.index(tmp_path / "a")] = tmp_path / "b"
    run_in_process(train_student_kd, *arguments, "--resume_from_checkpoint", "latest")
    assert best_of(tmp_path / "b/checkpoint-6") == best


def test_only_inception_makes_it_a_fid(pipelines, students, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(metrics, "load_inception", lambda path: FakeInception())
    (tmp_path / "inception.pth").write_bytes(b"")
    more = ["--eval_steps", 1, "--num_eval_images", 20, "--eval_inference_steps", 1]
    more += ["--inception_path", tmp_path / "inception.pth"]
    run_in_process(
        train_student_kd, *quick_student(pipelines, students("sd", "sd_small"), tmp_path / "out", *more, steps=1)
    )
    said = capsys.readouterr().out
    assert "fid " in said and best_of(tmp_path / "out/checkpoint-1")["metric"] == "fid"


def test_evaluation_in_two_processes_is_that_of_one(pipelines, students, tmp_path, capsys):
    """Five images over two processes: shares differ, figures do not."""

    def arguments(processes):
        more = ["--eval_steps", 1, "--num_eval_images", 5, "--eval_inference_steps", 2, "--learning_rate", 1e-9]
        more += ["--batch_size", 2 // processes]
        return quick_student(pipelines, students("sd", *NARROW), tmp_path / str(processes), *more, steps=1)

    def figures(output):
        (line,) = (line for line in output.splitlines() if "Evaluation at step 1: " in line)
        words = line.partition("Evaluation at step 1: ")[2].rstrip(".").split(", ")
        return {name: float(value) for name, value in (word.split() for word in words)}

    run_in_process(train_student_kd, *arguments(1))
    one = figures(capsys.readouterr().out)
    two = figures(launch(SCRIPT, *arguments(2), processes=2).stdout)
    assert one == pytest.approx(two, rel=1e-2, abs=1e-3)
    assert best_of(tmp_path / "2/checkpoint-1")["step"] == 1 and (tmp_path / "2/best/model_index.json").is_file()


def test_held_out_images_of_a_folder_are_judged(pipelines, students, tmp_path):
    (tmp_path / "data").mkdir()
    for index, caption in enumerate(["a red ring", "a blue cross", "a green square"]):
        Image.new("RGB", (40, 32), (80 * index, 20, 200)).save(tmp_path / f"data/{index}.png")
        (tmp_path / f"data/{index}.txt").write_text(caption)
    more = ["--eval_steps", 1, "--eval_data_dir", tmp_path / "data", "--eval_inference_steps", 1]
    more += ["--clip_model", ROOT / "assets/tiny-clip"]
    run_in_process(
        train_student_kd, *quick_student(pipelines, students("sd", "sd_small"), tmp_path / "out", *more, steps=1)
    )
    assert best_of(tmp_path / "out/checkpoint-1")["metric"] == "frechet_clip"
    assert "| clip_score, 3 images |" in (tmp_path / "out/best/README.md").read_text()


def test_better():
    first = better(None, {"clip_score": 20.0, "frechet_clip": 5.0}, 1)
    assert first == {"metric": "frechet_clip", "value": 5.0, "step": 1, "judges": None}
    assert better(first, {"frechet_clip": 5.0}, 2) is first and better(first, {"frechet_clip": 6.0}, 2) is first
    assert better(first, {"frechet_clip": 4.0}, 2)["step"] == 2
    again = {"metric": "clip_score", "value": 1.0, "step": 3, "judges": None}
    assert better(first, {"clip_score": 1.0}, 3) == again
    assert better(first, {"frechet_clip": 9.0}, 3, {"clip_model": "other"})["step"] == 3
    assert better({"metric": "clip_score", "value": 1.0, "step": 3}, {"clip_score": 2.0}, 4)["step"] == 4


# The output


def test_final_folder_and_checkpoint(uninterrupted):
    names = {path.name for path in (uninterrupted / "final").iterdir()}
    assert names == {
        "model_index.json",
        "unet",
        "vae",
        "text_encoder",
        "tokenizer",
        "scheduler",
        "distillation.json",
        "comfyui_workflow.json",
        "compression.json",
        "README.md",
    }
    card = (uninterrupted / "final/README.md").read_text()
    assert "| UNet | sd_small, widths [8, 16], " in card and "| weights of task, KD, features | 1, 1, 1 |" in card
    names = {path.name for path in (uninterrupted / "checkpoint-6").iterdir()}
    assert names == {"student.safetensors", "student_ema.safetensors", "optimizer.bin", "state.json"}
