"""train_student_kd.py: its loss and schedules, its promises about resume, accumulation and processes, its output."""

import json
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torchvision
from accelerate.utils import DistributedType
from conftest import ROOT, launch, random_pipeline, read_json, run_in_process
from contract import assert_contract
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

import train_student_kd
from common import compression, metrics
from common.arguments import UsageError, learning_rate_at, run_script
from common.checkpoint import CheckpointError, checkpoints_in
from common.diffusion import NoiseSchedule, ddim_scheduler, student_timesteps
from common.evaluation import better
from common.models import Conditioning, encode_empty_prompt, encode_prompts, load_pipeline
from train_student_kd import chain_index, draw, kd_loss, min_snr_weights, ramp

SCRIPT = ROOT / "train_student_kd.py"
# Adam divides by the gradient's size: with its usual epsilon a rounding error in a tiny gradient would count in full.
QUICK = ["--train_batch_size", 4, "--report_to", "none", "--dataset_name", "shapes", "--resolution", 32]
QUICK += ["--adam_epsilon", 1e-4]
# Every schedule at once: all are functions of the step, and must survive resume, accumulation and processes.
SCHEDULES = ["--kd_alpha_end", 0.25, "--caption_dropout_end", 0.5, "--chain_schedule", 1000, 500, 250]
SCHEDULES += ["--lr_scheduler", "one_cycle", "--snr_gamma", 5]
NARROW = ("sd_small", (8, 16))  # half the width, no middle block: with projections


@pytest.fixture(scope="session")
def students(pipelines, tmp_path_factory):
    """`students(kind, variant, widths)`: the folder of a student of the random pipeline, made once per session."""
    made = {}

    def get(kind="sd", variant=None, widths=None):
        if (kind, variant, widths) not in made:
            folder = tmp_path_factory.mktemp("student") / "pipeline"
            pipeline = load_pipeline(pipelines(kind))
            pipeline.unet, manifest = compression.build_student(pipeline.unet, variant, widths)
            pipeline.save_pretrained(folder)
            compression.write_manifest(folder, {"parent": pipelines(kind), **manifest})
            made[kind, variant, widths] = folder
        return made[kind, variant, widths]

    return get


def quick(pipelines, student, folder, *more, kind="sd", steps=2):
    model = ["--pretrained_model_name_or_path", pipelines(kind), "--student_model", student]
    return [*QUICK, *model, "--output_dir", folder, "--max_steps", steps, *more]


def weights(folder):
    """All tensors of a checkpoint: student with projections, EMA and optimizer state."""
    tensors = {**load_file(folder / "student.safetensors")}
    tensors.update({f"ema.{k}": v for k, v in load_file(folder / "student_ema.safetensors").items()})
    state = torch.load(folder / "optimizer.bin", weights_only=True)["state"]
    tensors.update({f"optimizer.{i}.{k}": torch.as_tensor(v) for i, s in state.items() for k, v in s.items()})
    return tensors


def assert_same(a, b, **tolerance):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys() and len(a) > 10
    for name in a:
        if tolerance:
            torch.testing.assert_close(a[name], b[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}")
        else:
            assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def uninterrupted(pipelines, students, tmp_path_factory):
    """Six steps in one go with every schedule, global batch 4, with a checkpoint every third."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    arguments = quick(pipelines, students("sd", *NARROW), folder, *SCHEDULES, "--checkpointing_steps", 3, steps=6)
    run_in_process(train_student_kd, *arguments)
    return folder


# The method


def test_kd_loss_has_known_values():
    ones, twos = torch.ones(2, 4, 8, 8), torch.full((2, 4, 8, 8), 2.0)
    features = [(ones, twos), (torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 100.0))]
    loss, (task, kd, feature) = kd_loss(ones, 3 * ones, 0 * ones, features, torch.tensor([1.0, 0.5]), 1, 0.5, 0.1)
    assert (task, kd, feature) == (0.75, 3.0, 1.25)  # 1 and 4 times 0.75; 1/4, and 1 however large the features are
    torch.testing.assert_close(loss, torch.tensor(0.75 + 0.5 * 3 + 0.1 * 1.25))
    loss, (task, _, feature) = kd_loss(ones, 3 * ones, None, [], torch.ones(2), 0, 1, 1)
    assert loss == 4 and task == 0 and feature == 0
    half = [(ones.half() * 300, twos.half() * 300)]  # whose squares are beyond half precision
    assert kd_loss(ones, ones, None, half, torch.ones(2), 0, 1, 1)[0] == 0.25


def test_kd_loss_is_a_mean_over_samples():
    torch.manual_seed(0)
    output, teacher, target = (torch.randn(4, 4, 8, 8) for _ in range(3))
    a, b, sample_weights = torch.randn(4, 6, 4, 4), torch.randn(4, 6, 4, 4), torch.rand(4)

    def loss(part):
        return kd_loss(output[part], teacher[part], target[part], [(a[part], b[part])], sample_weights[part], 1, 1, 1)

    whole, halves = loss(slice(None)), [loss(slice(0, 2)), loss(slice(2, 4))]
    torch.testing.assert_close(whole[0], (halves[0][0] + halves[1][0]) / 2)
    exact = kd_loss(teacher, teacher, target, [(b, b)], sample_weights, 0, 1, 1)
    assert exact[0] == 0


@pytest.mark.parametrize("kind, target", [("sd", "epsilon"), ("v", "v_prediction")])
def test_min_snr_is_the_weight_of_an_error_in_x0(kind, target):
    schedule = NoiseSchedule(random_pipeline(kind).scheduler)
    t, z = torch.tensor([0, 100, 500, 999]), torch.randn(4, 4, 8, 8)
    outputs = torch.randn(2, 4, 4, 8, 8).unbind()
    own, x0 = ((a - b).square().mean(dim=(1, 2, 3)) for a, b in
               (outputs, [schedule.to_x0(output, z, t) for output in outputs]))  # fmt: skip
    snr = schedule.snr(t).flatten()
    torch.testing.assert_close(min_snr_weights(schedule, t, 5) * own, snr.clamp(max=5) * x0, rtol=1e-3, atol=1e-6)
    assert min_snr_weights(schedule, t, None).tolist() == [1, 1, 1, 1]


def test_schedules_at_their_ends_and_middle():
    assert [ramp(1.0, 0.5, step, 101) for step in (0, 50, 100)] == [1.0, 0.75, 0.5]
    assert [ramp(0.0, 0.2, step, 101) for step in (0, 50, 100)] == [0.0, 0.1, 0.2]
    assert ramp(1.0, 0.5, 0, 1) == 1.0
    assert [chain_index(step, 9, 3) for step in range(9)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [chain_index(step, 4, 3) for step in range(4)] == [0, 0, 1, 2] and chain_index(0, 1, 3) == 0


@pytest.mark.parametrize("steps, warmup", [(10, 0), (50, 0), (50, 5), (7, 3)])
def test_one_cycle_is_torchs(steps, warmup):
    args = SimpleNamespace(lr_scheduler="one_cycle", lr_warmup_steps=warmup, learning_rate=1e-3, max_train_steps=steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    torchs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1e-3, total_steps=steps, pct_start=warmup / steps if warmup else 0.3
    )
    for step in range(steps):
        assert learning_rate_at(step, args) == pytest.approx(torchs.get_last_lr()[0], rel=1e-9, abs=1e-15)
        optimizer.step()
        if step < steps - 1:
            torchs.step()


def test_draws_are_the_samples_own():
    args = SimpleNamespace(seed=0)
    chain = student_timesteps(ddim_scheduler(random_pipeline("sd").scheduler, 250), 250)
    noise, timesteps, dropped = draw(args, 7, range(2000), (1, 2, 2), chain, 0.3)
    assert set(timesteps.tolist()) <= set(chain) and len(set(timesteps.tolist())) > 240
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.04)
    again = draw(args, 7, range(1000, 1010), (1, 2, 2), chain, 0.3)
    for whole, part in zip((noise, timesteps, dropped), again):
        assert torch.equal(whole[1000:1010], part)
    other, _, more = draw(args, 7, range(2000), (1, 2, 2), chain[:10], 0.6)
    assert torch.equal(other, noise) and bool((more | ~dropped).all())  # a flag changes its own draws alone


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_an_emptied_caption_is_its_samples_alone(kind):
    pipeline = random_pipeline(kind)
    given, empty = encode_prompts(pipeline, ["a red ring", "a blue ring"], 32), encode_empty_prompt(pipeline, 32)
    mixed = given.where(torch.tensor([False, True]), empty)
    assert torch.equal(mixed.prompt_embeds[0], given.prompt_embeds[0])
    assert torch.equal(mixed.prompt_embeds[1], empty.prompt_embeds[0])
    if kind == "sdxl":
        assert torch.equal(mixed.pooled_prompt_embeds[1], empty.pooled_prompt_embeds[0])
        assert torch.equal(mixed.pooled_prompt_embeds[0], given.pooled_prompt_embeds[0])
    else:
        assert isinstance(mixed, Conditioning) and mixed.pooled_prompt_embeds is None


def spy_losses(monkeypatch):
    """The terms of every loss that is computed from here on: a list of (loss, task, kd, feature)."""
    seen = []

    def spy(*arguments):
        loss, terms = kd_loss(*arguments)
        seen.append([x.item() for x in (loss, *terms)])
        return loss, terms

    monkeypatch.setattr(train_student_kd, "kd_loss", spy)
    return seen


@pytest.mark.parametrize("kind", ["sd", "v", "sdxl"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(pipelines, students, tmp_path, monkeypatch, kind):
    seen = spy_losses(monkeypatch)
    more = ["--caption_dropout_start", 0.5, "--learning_rate", 1e-12]
    run_in_process(train_student_kd, *quick(pipelines, students(kind), tmp_path, *more, kind=kind, steps=1))
    loss, task, kd, feature = seen[0]
    assert kd == 0 and feature == 0 and loss == task > 0


def test_a_teacher_of_epsilon_teaches_v(pipelines, students, tmp_path, monkeypatch):
    """The same UNet read as v is wrong at first; the teacher's output, converted, is what it is compared with."""
    seen = spy_losses(monkeypatch)
    more = ["--prediction_type", "v_prediction", "--snr_gamma", 5]
    run_in_process(train_student_kd, *quick(pipelines, students("sd"), tmp_path, *more))
    assert seen[0][2] > 0 and seen[0][3] == 0
    pipeline = load_pipeline(tmp_path / "final")
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    contract = read_json(tmp_path / "final/distillation.json")
    assert_contract(pipeline, ddim_scheduler(pipeline.scheduler, 4), contract, 4)
    # What such a student learns: converted back, the teacher's epsilon.
    teacher, schedule = (NoiseSchedule(random_pipeline(kind).scheduler) for kind in ("sd", "v"))
    t, z, epsilon = torch.tensor([1, 500, 999]), torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    v = teacher.convert(epsilon, z, t, "v_prediction")
    torch.testing.assert_close(schedule.to_epsilon(v, z, t), epsilon, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(schedule.to_x0(v, z, t), teacher.to_x0(epsilon, z, t), atol=1e-3, rtol=1e-4)
    assert torch.equal(teacher.convert(epsilon, z, t, "epsilon"), epsilon)


# Training


@pytest.mark.parametrize("kind, cut", [("v", ("sd_small", None)), ("sdxl", ("sd_base", None)), ("sd", NARROW)])
def test_every_kind_of_model_trains_and_keeps_the_contract(pipelines, students, tmp_path, kind, cut):
    more = ["--gradient_checkpointing", "--export", "fp16", "--validation_prompts", "a ring", "--validation_steps", 2]
    more += ["--num_validation_images", 1, "--teacher_cpu_offload", "--eval_inference_steps", 2]
    run_in_process(train_student_kd, *quick(pipelines, students(kind, *cut), tmp_path, *more, kind=kind))
    final = tmp_path / "final"
    contract = read_json(final / "distillation.json")
    assert contract["method"] == "student_kd" and contract["parent"] == pipelines(kind)
    assert (contract["guidance"], contract["guidance_scale"], contract["steps"]) == ("cfg", 7.5, None)
    pipeline = load_pipeline(final)
    for steps in (1, 2, 4, 8):
        assert_contract(pipeline, ddim_scheduler(pipeline.scheduler, steps), contract, steps)
    assert read_json(final / "compression.json") == read_json(students(kind, *cut) / "compression.json")
    assert (tmp_path / "samples" / "step-2.png").is_file()
    exported = load_pipeline(tmp_path / "final-fp16", dtype=torch.float16)
    for name, value in load_pipeline(final, dtype=torch.float16).unet.state_dict().items():
        assert torch.equal(exported.unet.state_dict()[name], value)
    assert (tmp_path / "final-fp16" / "compression.json").is_file()


def test_a_chain_decides_how_the_output_is_sampled(uninterrupted):
    pipeline, contract = load_pipeline(uninterrupted / "final"), read_json(uninterrupted / "final/distillation.json")
    assert (contract["steps"], contract["target"]) == (250, "next")
    assert contract["timesteps"] == list(range(999, 0, -4))
    assert student_timesteps(pipeline.scheduler, 250) == contract["timesteps"]
    assert_contract(pipeline, pipeline.scheduler, contract, 10)
    assert_contract(pipeline, pipeline.scheduler, contract, 25)


def test_the_default_student_is_sd_small_of_the_teacher(pipelines, tmp_path):
    arguments = [*QUICK, "--pretrained_model_name_or_path", pipelines(), "--output_dir", tmp_path, "--max_steps", 1]
    run_in_process(train_student_kd, *arguments)
    manifest = read_json(tmp_path / "student" / "compression.json")
    assert manifest["variant"] == "sd_small" and manifest["parent"] == pipelines()
    assert load_pipeline(tmp_path / "final").unet.config.mid_block_type is None
    before = (tmp_path / "student/unet/config.json").stat().st_mtime_ns
    run_in_process(train_student_kd, *arguments, "--max_steps", 2, "--resume_from_checkpoint", "latest")
    assert (tmp_path / "student/unet/config.json").stat().st_mtime_ns == before
    assert (tmp_path / "checkpoint-2").is_dir()


def test_the_students_parent_is_the_default_teacher(pipelines, students, tmp_path):
    arguments = [*QUICK, "--student_model", students("sd", "sd_small"), "--output_dir", tmp_path, "--max_steps", 1]
    run_in_process(train_student_kd, *arguments)
    assert read_json(tmp_path / "final/distillation.json")["parent"] == pipelines()


def test_random_latents_need_captions_only(pipelines, students, tmp_path, monkeypatch):
    seen = spy_losses(monkeypatch)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/captions.json").write_text(json.dumps([{"text": "a red ring"}, {"text": "a blue cross"}]))
    arguments = quick(pipelines, students("sd", "sd_small"), tmp_path / "out", "--random_latents", steps=1)
    at = arguments.index("--dataset_name")
    arguments[at : at + 2] = ["--data_dir", tmp_path / "data"]
    run_in_process(train_student_kd, *arguments)
    assert seen[0][1] == 0 and seen[0][2] > 0 and (tmp_path / "out/final").is_dir()


def test_a_few_step_teachers_timesteps_are_the_students(pipelines, students, tmp_path, monkeypatch):
    """Its guidance is baked in: no error against the noise, no guidance of the student, no other timesteps."""
    teacher = tmp_path / "teacher"
    shutil.copytree(pipelines(), teacher)
    contract = {"method": "x", "parent": "y", "steps": 2, "timesteps": [999, 499], "guidance": "baked",
                "guidance_scale": 1.0, "target": "next"}  # fmt: skip
    (teacher / "distillation.json").write_text(json.dumps(contract))
    seen, drawn = spy_losses(monkeypatch), []

    def spy(*arguments):
        found = draw(*arguments)
        drawn.extend(found[1].tolist())
        return found

    monkeypatch.setattr(train_student_kd, "draw", spy)
    arguments = quick(pipelines, students("sd", "sd_small"), tmp_path / "out", steps=3)
    arguments[arguments.index(pipelines())] = teacher
    run_in_process(train_student_kd, *arguments)
    assert set(drawn) == {999, 499} and all(task == 0 for _, task, _, _ in seen)
    own = read_json(tmp_path / "out/final/distillation.json")
    assert own == {**contract, "method": "student_kd", "parent": str(teacher)}


def test_a_student_with_its_own_text_encoder_gets_its_own_embeddings(pipelines, students, tmp_path, monkeypatch):
    student = tmp_path / "student"
    shutil.copytree(students("sd", "sd_small"), student)
    pipeline = load_pipeline(student)
    for parameter in pipeline.text_encoder.parameters():
        parameter.mul_(1.1)
    pipeline.text_encoder.save_pretrained(student / "text_encoder")
    used = []

    def spy(pipeline, *arguments):
        used.append(id(pipeline.text_encoder))
        return encode_prompts(pipeline, *arguments)

    monkeypatch.setattr(train_student_kd, "encode_prompts", spy)
    run_in_process(train_student_kd, *quick(pipelines, student, tmp_path / "two", steps=1))
    run_in_process(train_student_kd, *quick(pipelines, students("sd", "sd_small"), tmp_path / "one", steps=1))
    assert len(used) == 3 and len(set(used[:2])) == 2
    saved = load_pipeline(tmp_path / "two/final").text_encoder.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in pipeline.text_encoder.state_dict().items())


def test_bf16_trains_fp32_weights(pipelines, students, tmp_path):
    run_in_process(train_student_kd, *quick(pipelines, students("sd", *NARROW), tmp_path, "--mixed_precision", "bf16"))
    mine = weights(tmp_path / "checkpoint-2")
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in mine.values())
    final = load_file(tmp_path / "final/unet/diffusion_pytorch_model.safetensors")
    assert all(value.dtype == torch.float32 for value in final.values())


def test_compiled_is_the_plain_run_under_the_same_names(pipelines, students, uninterrupted, tmp_path, monkeypatch):
    """Features are read out of traced graphs too. Without Inductor, which takes minutes to generate its CPU code."""
    compiled, compile = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m: compiled.append(compile(m, backend="aot_eager")))
    arguments = quick(pipelines, students("sd", *NARROW), tmp_path, *SCHEDULES, "--torch_compile", steps=6)
    run_in_process(train_student_kd, *arguments)
    assert len(compiled) == 2
    assert_same(tmp_path / "checkpoint-6", uninterrupted / "checkpoint-6", atol=2e-5, rtol=1e-3)


def test_every_trained_weight_moves_and_projections_stay_out_of_the_output(uninterrupted):
    before, after = (load_file(uninterrupted / f"checkpoint-{n}" / "student.safetensors") for n in (3, 6))
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert {name.split(".")[1] for name in before if name.startswith("projections.")} == {
        "down_blocks_0", "down_blocks_1", "up_blocks_0", "up_blocks_1"}  # fmt: skip
    ema = load_file(uninterrupted / "checkpoint-6" / "student_ema.safetensors")
    final = load_file(uninterrupted / "final/unet/diffusion_pytorch_model.safetensors")
    assert {f"unet.{name}" for name in final} == {name for name in ema if name.startswith("unet.")}
    assert all(torch.equal(value, ema[f"unet.{name}"]) for name, value in final.items())


def test_accumulation_is_the_large_batch(pipelines, students, uninterrupted, tmp_path):
    more = [*SCHEDULES, "--gradient_accumulation_steps", 4, "--batch_size", 1]
    run_in_process(train_student_kd, *quick(pipelines, students("sd", *NARROW), tmp_path, *more, steps=6))
    assert_same(tmp_path / "checkpoint-6", uninterrupted / "checkpoint-6", atol=2e-5, rtol=1e-3)


def test_resume_is_the_uninterrupted_run_bit_for_bit(pipelines, students, uninterrupted, tmp_path):
    """From another folder's copy of checkpoint-3: what counts is on the disk."""
    shutil.copytree(uninterrupted / "checkpoint-3", tmp_path / "checkpoint-3")
    more = [*SCHEDULES, "--resume_from_checkpoint", "latest"]
    run_in_process(train_student_kd, *quick(pipelines, students("sd", *NARROW), tmp_path, *more, steps=6))
    assert_same(tmp_path / "checkpoint-6", uninterrupted / "checkpoint-6")


KILLED_WHILE_SAVING = """
import os, runpy, signal, sys
import accelerate.accelerator
script, killed_at = sys.argv[1:3]
save = accelerate.accelerator.save_accelerator_state  # runs after the hook that writes the weights
def torn(folder, *arguments, **options):
    if str(folder).endswith(killed_at):
        os.kill(os.getpid(), signal.SIGKILL)
    return save(folder, *arguments, **options)
accelerate.accelerator.save_accelerator_state = torn
sys.argv[1:] = sys.argv[3:]
sys.path.insert(0, os.path.dirname(script))
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_kill_9_while_saving_and_resume_bit_for_bit(pipelines, students, uninterrupted, tmp_path, processes):
    """Two processes are one, too: killed and resumed or not, up to the order of a sum."""
    (tmp_path / "killed.py").write_text(KILLED_WHILE_SAVING)
    more = [*SCHEDULES, "--checkpointing_steps", 3, "--batch_size", 4 // processes]
    arguments = quick(pipelines, students("sd", *NARROW), tmp_path / "run", *more, steps=6)
    result = launch(tmp_path / "killed.py", SCRIPT, ".checkpoint-6.tmp", *arguments, check=False, processes=processes)
    assert result.returncode != 0 and "SIGKILL" in result.stdout, result.stdout[-2000:]
    assert [step for step, _ in checkpoints_in(tmp_path / "run")] == [3]
    launch(SCRIPT, *arguments, "--resume_from_checkpoint", "latest", processes=processes)
    resumed = tmp_path / "run/checkpoint-6"
    if processes == 1:
        assert_same(resumed, uninterrupted / "checkpoint-6")
    else:
        arguments = quick(pipelines, students("sd", *NARROW), tmp_path / "whole", *more, steps=6)
        launch(SCRIPT, *arguments, processes=2)
        assert_same(resumed, tmp_path / "whole/checkpoint-6")
        assert_same(resumed, uninterrupted / "checkpoint-6", atol=2e-5, rtol=1e-3)
    assert (tmp_path / "run/final").is_dir() and not list((tmp_path / "run").glob(".*.tmp"))


def test_another_run_is_refused_and_another_length_is_said(pipelines, students, uninterrupted, tmp_path, capsys):
    student = students("sd", *NARROW)
    shutil.copytree(uninterrupted / "checkpoint-3", tmp_path / "checkpoint-3")
    with pytest.raises(CheckpointError, match="already holds a run"):
        run_in_process(train_student_kd, *quick(pipelines, student, tmp_path, *SCHEDULES, steps=6))
    resume = [*SCHEDULES, "--resume_from_checkpoint", "latest"]
    for change in (["--kd_weight", 2], ["--student_model", students("sd", "sd_small")], ["--snr_gamma", 1]):
        with pytest.raises(CheckpointError, match=change[0].strip("-")):
            run_in_process(train_student_kd, *quick(pipelines, student, tmp_path, *resume, *change))
    capsys.readouterr()
    run_in_process(train_student_kd, *quick(pipelines, student, tmp_path, *resume, steps=4))
    said = "--lr_scheduler one_cycle, --kd_alpha_end, --caption_dropout_end, --chain_schedule was planned for 6 steps"
    assert said in capsys.readouterr().out


# Evaluation


def evaluating(tmp_path):
    """Flags with a random LPIPS trunk; Inception's weights are not ours to make up, so a stub is patched in."""
    torch.manual_seed(0)
    trunk = torchvision.models.vgg16(weights=None).features
    save_file({f"features.{k}": v for k, v in trunk.state_dict().items()}, tmp_path / "vgg16.safetensors")
    return ["--eval_steps", 2, "--num_eval_images", 5, "--eval_inference_steps", 2, "--lpips_trunk_path",
            tmp_path / "vgg16.safetensors"]  # fmt: skip


def test_evaluation_leaves_training_bit_identical_and_remembers_the_best(
    pipelines, students, uninterrupted, tmp_path, capsys
):
    more = [*SCHEDULES, *evaluating(tmp_path), "--checkpointing_steps", 3, "--report_to", "tensorboard"]
    arguments = quick(pipelines, students("sd", *NARROW), tmp_path / "a", *more, steps=6)
    run_in_process(train_student_kd, *arguments)
    assert_same(tmp_path / "a/checkpoint-6", uninterrupted / "checkpoint-6")
    said = capsys.readouterr().out
    assert said.count("Evaluation at step") == 3 and "frechet_clip" in said and "clip_score" in said
    assert "lpips_teacher" in said and "scene_accuracy" in said and "fid" not in said
    best = read_json(tmp_path / "a/checkpoint-6/best.json")
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
    assert read_json(tmp_path / "b/checkpoint-6/best.json") == best


def test_only_inception_makes_it_a_fid(pipelines, students, tmp_path, capsys, monkeypatch):
    class Stub(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(3 * 16, 8, generator=torch.Generator().manual_seed(0)))

        def forward(self, images):
            assert images.dtype == torch.uint8
            return torch.nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1) @ self.weight

    monkeypatch.setattr(metrics, "load_inception", lambda path: Stub().requires_grad_(False))
    (tmp_path / "inception.pth").write_bytes(b"")
    more = ["--eval_steps", 1, "--num_eval_images", 20, "--eval_inference_steps", 1]
    more += ["--inception_path", tmp_path / "inception.pth"]
    run_in_process(train_student_kd, *quick(pipelines, students("sd", "sd_small"), tmp_path / "out", *more, steps=1))
    said = capsys.readouterr().out
    assert "fid " in said and read_json(tmp_path / "out/checkpoint-1/best.json")["metric"] == "fid"


def test_evaluation_in_two_processes_is_that_of_one(pipelines, students, tmp_path):
    """Five images over two processes: shares differ, figures do not."""
    lines = []
    for processes in (1, 2):
        more = ["--eval_steps", 2, "--num_eval_images", 5, "--eval_inference_steps", 2]
        more += ["--batch_size", 2 // processes, "--learning_rate", 1e-9]
        arguments = quick(pipelines, students("sd", *NARROW), tmp_path / str(processes), *more)
        output = launch(SCRIPT, *arguments, processes=processes).stdout
        line = next(line for line in output.splitlines() if "Evaluation at step 2:" in line)
        words = line.partition("Evaluation at step 2: ")[2].rstrip(".").split(", ")
        lines.append({name: float(value) for name, value in (word.split() for word in words)})
    assert lines[0] == pytest.approx(lines[1], rel=1e-2, abs=1e-3)


def test_held_out_images_of_a_folder_are_judged(pipelines, students, tmp_path):
    (tmp_path / "data").mkdir()
    for index, caption in enumerate(["a red ring", "a blue cross", "a green square"]):
        Image.new("RGB", (40, 32), (80 * index, 20, 200)).save(tmp_path / f"data/{index}.png")
        (tmp_path / f"data/{index}.txt").write_text(caption)
    more = ["--eval_steps", 1, "--eval_data_dir", tmp_path / "data", "--eval_inference_steps", 1]
    more += ["--clip_model", ROOT / "assets/tiny-clip"]
    run_in_process(train_student_kd, *quick(pipelines, students("sd", "sd_small"), tmp_path / "out", *more, steps=1))
    assert read_json(tmp_path / "out/checkpoint-1/best.json")["metric"] == "frechet_clip"
    assert "| clip_score, 3 images |" in (tmp_path / "out/best/README.md").read_text()


def test_better():
    first = better(None, {"clip_score": 20.0, "frechet_clip": 5.0}, 1)
    assert first == {"metric": "frechet_clip", "value": 5.0, "step": 1}
    assert better(first, {"frechet_clip": 5.0}, 2) is first and better(first, {"frechet_clip": 6.0}, 2) is first
    assert better(first, {"frechet_clip": 4.0}, 2)["step"] == 2
    assert better(first, {"clip_score": 1.0}, 3) == {"metric": "clip_score", "value": 1.0, "step": 3}
    assert better({"metric": "clip_score", "value": 1.0, "step": 3}, {"clip_score": 2.0}, 4)["step"] == 4


# The output

STOCK = """
import sys, torch
from diffusers import DiffusionPipeline
final, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(final)
images = pipe(["a red ring"], num_inference_steps=5, guidance_scale=3.0, height=32, width=32, output_type="pt",
              generator=torch.Generator().manual_seed(0)).images
torch.save(images, out)
"""


def test_final_in_stock_diffusers_is_the_student_in_memory(students, uninterrupted, tmp_path):
    final = uninterrupted / "final"
    subprocess.run([sys.executable, "-c", STOCK, final, tmp_path / "images.pt"], check=True, cwd=tmp_path)
    stock = torch.load(tmp_path / "images.pt", weights_only=True)
    pipeline = load_pipeline(students("sd", *NARROW))
    ema = load_file(uninterrupted / "checkpoint-6" / "student_ema.safetensors")
    pipeline.unet.load_state_dict({k.removeprefix("unet."): v for k, v in ema.items() if k.startswith("unet.")})
    pipeline.scheduler = ddim_scheduler(pipeline.scheduler, 250)
    mine = pipeline(["a red ring"], num_inference_steps=5, guidance_scale=3.0, height=32, width=32, output_type="pt",
                    generator=torch.Generator().manual_seed(0)).images  # fmt: skip
    torch.testing.assert_close(stock, mine, atol=1e-6, rtol=0)


def test_final_folder_and_checkpoint(uninterrupted):
    names = {path.name for path in (uninterrupted / "final").iterdir()}
    assert names == {"model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler", "distillation.json",
                     "compression.json", "README.md"}  # fmt: skip
    card = (uninterrupted / "final/README.md").read_text()
    assert "DiffusionPipeline.from_pretrained" in card and "sd_small, widths [8, 16]" in card
    names = {path.name for path in (uninterrupted / "checkpoint-6").iterdir()}
    assert names == {"student.safetensors", "student_ema.safetensors", "optimizer.bin", "best.json", "state.json"}


def test_recipes_parse():
    for name in ("tiny_student_kd.sh", "sd15_student_kd.sh"):
        recipe = (ROOT / "recipes" / name).read_text().replace("\\\n", " ")
        for line in recipe.splitlines():
            if " train_student_kd.py " in line:
                words = shlex.split(line.split(" train_student_kd.py ")[1].replace("$((64 / processes))", "64"))
                train_student_kd.parse_args([word for word in words if word != "$@"])


# Mistakes

MISTAKES = [
    (["--pretrained_model_name_or_path", "no/such/folder"], "--pretrained_model_name_or_path no/such/folder"),
    (["--student_model", "nowhere"], "compression.json"),
    (["--student_model", "{plain}"], "compression.json"),
    (["--student_model", "{broken}"], "compression.json"),
    (["--student_model", "{latents}"], "its latents' scale"),
    (["--student_model", "{text}"], "its text width"),
    (["--student_model", "{betas}"], "its noise schedule"),
    (["--student_model", "{names}"], "no_such_block"),
    (["--student_model", "{sizes}"], "of different sizes"),
    (["--task_weight", "0", "--kd_weight", "0"], "--task_weight"),
    (["--random_latents", "--task_weight", "1"], "--random_latents"),
    (["--random_latents", "--kd_weight", "0"], "--kd_weight"),
    (["--chain_schedule", "500", "1000"], "--chain_schedule"),
    (["--chain_schedule", "2000", "1000"], "--chain_schedule"),
    (["--eval_steps", "1", "--num_eval_images", "1"], "--num_eval_images"),
    (["--eval_steps", "1", "--lpips_trunk_path", "nowhere.pth"], "--lpips_trunk_path"),
    (["--eval_steps", "1", "--clip_model", "{tmp}"], "No CLIP judge"),
    (["--eval_steps", "1", "--eval_data_dir", "nowhere"], "--eval_data_dir nowhere"),
    (["--eval_steps", "1", "--eval_data_dir", "{plain}"], "no judge"),
    (["--eval_steps", "1", "--eval_data_dir", "{plain}", "--clip_model", "{tmp}"], "--eval_data_dir"),
    (["--report_to", "no_such_tracker"], "--report_to"),
    (["--resume_from_checkpoint", "checkpoint-7"], "checkpoint-7"),
    (["--data_dir", "nowhere"], "nowhere"),
    (["--resolution", "30"], "--resolution"),
]


def broken_students(good, folder):
    """{name: folder} of students that can't learn from the random pipeline."""
    made = {}

    def copy(name, file=None, **changes):
        made[name] = folder / name
        shutil.copytree(good, made[name])
        if file:
            (made[name] / file).write_text(json.dumps({**read_json(made[name] / file), **changes}))

    copy("plain")
    (made["plain"] / "compression.json").unlink()
    copy("broken")
    (made["broken"] / "compression.json").write_text("{")
    copy("latents", "vae/config.json", scaling_factor=0.1)
    copy("text", "unet/config.json", cross_attention_dim=48)
    copy("betas", "scheduler/scheduler_config.json", beta_end=0.02)
    copy("names", "compression.json", feature_pairs=[["no_such_block", "mid_block"]])
    copy("sizes", "compression.json", feature_pairs=[["down_blocks.0", "up_blocks.1"]])
    return made


@pytest.mark.parametrize("wrong, said", MISTAKES, ids=[" ".join(wrong) for wrong, _ in MISTAKES])
def test_mistakes_are_one_sentence(pipelines, students, tmp_path, capsys, wrong, said):
    made = broken_students(students("sd", "sd_small"), tmp_path)
    wrong = [word.format(tmp=tmp_path, **made) for word in wrong]
    arguments = quick(pipelines, students("sd", "sd_small"), tmp_path / "out")
    if "--data_dir" in wrong:
        arguments.remove("--dataset_name")
        arguments.remove("shapes")
    args = train_student_kd.parse_args([str(word) for word in [*arguments, *wrong]])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_script(run_with, args)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert said in error and error.count("error: ") == 1 and "Traceback" not in error, error
    # What needs the models comes after their bars.
    loaded = ("its noise schedule", "no_such_block", "of different sizes", "No CLIP judge", "--eval_data_dir")
    assert error.startswith("error: ") or said in loaded
    assert error.strip().splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_sharded_training_is_refused(pipelines, students, tmp_path, monkeypatch, kind):
    accelerator = SimpleNamespace(distributed_type=kind)
    monkeypatch.setattr(train_student_kd, "Accelerator", lambda **options: accelerator)
    with pytest.raises(UsageError, match="DDP only"):
        run_in_process(train_student_kd, *quick(pipelines, students("sd", "sd_small"), tmp_path))


def run_with(args):
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    train_student_kd.main(args)


def test_every_flag_has_help(monkeypatch):
    parsers, original = [], train_student_kd.arguments.make_parser
    monkeypatch.setattr(
        train_student_kd.arguments, "make_parser", lambda text: parsers.append(original(text)) or parsers[-1]
    )
    args = train_student_kd.parse_args([])
    assert all(action.help for action in parsers[0]._actions)
    parsers[0].format_help()
    json.dumps(vars(args))


def test_sd_tiny_of_sd15_has_features_of_equal_sizes():
    """The pairs of the full-size student, on the meta device: its last stage no longer downsamples."""
    with torch.device("meta"):
        teacher = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        student, manifest = compression.build_student(teacher, "sd_tiny")
        inputs = torch.zeros(1, 4, 8, 8), torch.zeros(1)
        shapes = []
        for unet, names in zip((student, teacher), zip(*manifest["feature_pairs"])):
            with train_student_kd.FeatureTap(unet.to("meta"), names) as tap:
                unet(*inputs, encoder_hidden_states=torch.zeros(1, 77, 768))
            shapes.append([tap.features[name].shape for name in names])
    assert shapes[0] == shapes[1] and len(shapes[0]) == 6
