"""train_progressive.py: its targets, its stages, resume inside them, and what it refuses."""

import shutil
from functools import partial
from types import SimpleNamespace

import launching
import pytest
import torch
from conftest import ROOT, random_pipeline, read_json, run_in_process
from contract import assert_contract
from launching import assert_same_checkpoints, checkpoint_tensors, error_of, fork_and_wait
from safetensors.torch import load_file

import train_progressive
from common.conditioning import encode_prompts, predict, predict_guided
from common.contract import write_distillation
from common.diffusion import NoiseSchedule
from common.errors import CheckpointError, UsageError
from common.pipelines import load_pipeline, with_guidance_input
from common.schedulers import ddim_scheduler, student_timesteps
from train_progressive import (
    draw,
    progressive_loss,
    stage_at,
    stage_grid,
    stage_lengths,
    student_steps,
    teacher_steps_in_one,
)

SCRIPT = ROOT / "train_progressive.py"
assert_same = partial(assert_same_checkpoints, name="student")


def quick(pipelines, folder, *more, **options):
    """8 -> 4 -> 2 steps, three updates each."""
    stages = ["--start_steps", 8, "--end_steps", 2, "--steps_per_stage", 3, "--checkpointing_steps", 4]
    return launching.quick(pipelines, folder, *stages, *more, steps=1000, **options)  # a cap that is never reached


@pytest.fixture(scope="module")
def uninterrupted(pipelines, tmp_path_factory):
    """All stages in one go, global batch 4: checkpoints 3 (end of a stage), 4 and 6."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_in_process(train_progressive, *quick(pipelines, folder))
    return folder


# The method


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [64, 8, 2])
def test_the_closed_form_takes_one_step_to_where_the_teacher_got_in_two(prediction_type, steps):
    scheduler = ddim_scheduler(random_pipeline("sd").scheduler, 4)
    schedule = NoiseSchedule(type(scheduler).from_config(scheduler.config, prediction_type=prediction_type))
    t, middle, after = stage_grid(scheduler, steps)
    assert after[-1] == -1
    z, first, second = (torch.randn(len(t), 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    if prediction_type == "epsilon":  # what a model says of z is near its noise, or x0 would be of any size at t = 999
        first, second = z + 0.05 * first, z + 0.05 * second
    z_next = schedule.ddim_step(second, schedule.ddim_step(first, z, t, middle), middle, after)
    x0 = schedule.x0_of_step(z_next, z, t, after)
    epsilon = (z - schedule.alpha(t) * x0) / schedule.sigma(t)
    output = schedule.target(x0, epsilon, t)
    torch.testing.assert_close(schedule.ddim_step(output, z, t, after), z_next, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x0[-1:], z_next[-1:])
    for space in ("v", "x"):
        assert progressive_loss(output, z, t, z_next, after, schedule, space) < 1e-6
        assert progressive_loss(output + 0.1, z, t, z_next, after, schedule, space) > 1e-3


def test_loss_spaces():
    """v: the plain error of v = alpha eps - sigma x. x: an error in x0 with weight max(SNR, 1)."""
    schedule = NoiseSchedule(random_pipeline("v").scheduler)
    z, output, z_next = (torch.randn(2, 4, 8, 8) for _ in range(3))
    t, after = torch.tensor([749, 249]), torch.tensor([499, -1])
    x0 = schedule.x0_of_step(z_next, z, t, after)
    v = schedule.target(x0, (z - schedule.alpha(t) * x0) / schedule.sigma(t), t)
    loss = progressive_loss(output, z, t, z_next, after, schedule, "v")
    torch.testing.assert_close(loss, (output - v).square().mean(), rtol=1e-4, atol=0)
    error = (schedule.to_x0(output, z, t) - x0).square().mean(dim=(1, 2, 3)) * schedule.snr(t).flatten().clamp(min=1)
    torch.testing.assert_close(progressive_loss(output, z, t, z_next, after, schedule, "x"), error.mean())


def test_stages():
    assert student_steps(1000, 8, EXERCISE[1:]) == EXERCISE[1:]
    assert student_steps(64, 4) == [32, 16, 8, 4] and student_steps(6, 3) == [3] and student_steps(2, 1) == [1]
    assert [stage_at(step, [3, 2]) for step in range(6)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0)]
    for last, lengths in ((None, [5, 5, 5]), ([7], [5, 7, 7]), ([6, 8], [5, 6, 8]), ([6, 7, 8], [6, 7, 8])):
        assert stage_lengths(SimpleNamespace(steps_per_stage=5, last_stages_steps=last), 3) == lengths
    assert stage_lengths(SimpleNamespace(steps_per_stage=5, last_stages_steps=[7]), 1) == [7]


@pytest.mark.parametrize("steps", [512, 64, 32, 16, 8, 4, 2])
def test_a_students_timesteps_are_every_other_one_of_its_teachers(steps):
    scheduler = random_pipeline("sd").scheduler
    teacher = student_timesteps(ddim_scheduler(scheduler, steps), steps)
    t, middle, after = (times.tolist() for times in stage_grid(scheduler, steps))
    assert t == teacher[0::2] and middle == teacher[1::2] and after == [*t[1:], -1] and t[0] == 999


EXERCISE = [1000, 500, 250, 125, 64, 32, 16, 8]


@pytest.mark.parametrize("teacher, steps", [*zip(EXERCISE, EXERCISE[1:]), (9, 3), (1000, 333), (3, 2)])
def test_any_schedule_goes_from_one_of_a_students_timesteps_to_the_next(teacher, steps):
    scheduler = random_pipeline("sd").scheduler
    times = stage_grid(scheduler, teacher, steps)
    assert len(times) - 1 == teacher_steps_in_one(teacher, steps) and all(len(part) == steps for part in times)
    own = student_timesteps(ddim_scheduler(scheduler, steps), steps)
    assert times[0].tolist() == own and times[-1].tolist() == [*own[1:], -1]
    lengths = torch.stack(times[:-1]) - torch.stack(times[1:])
    assert lengths.min() > 0 and lengths.max() - lengths.min() <= 1  # in timesteps, of steps as long as can be
    if teacher % steps == 0 and 1000 % teacher == 0:  # through the teacher's own timesteps, every one
        assert torch.stack(times[:-1]).T.flatten().tolist() == student_timesteps(
            ddim_scheduler(scheduler, teacher), teacher
        )


@pytest.mark.parametrize("teacher, steps", [(125, 64), (1000, 333)])
def test_targets_land_on_the_students_next_timesteps(monkeypatch, teacher, steps):
    """A teacher that knows the noise takes z_t of (x, eps) to z_s of the same, whatever the steps between."""
    scheduler = random_pipeline("sd").scheduler
    schedule, times = NoiseSchedule(scheduler), stage_grid(scheduler, teacher, steps)
    x, noise = (torch.randn(steps, 4, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(2))
    monkeypatch.setattr(train_progressive, "predict", lambda *_: noise)
    z = schedule.add_noise(x, noise, times[0])
    z_next = train_progressive.teach(torch.nn.Module(), schedule, z, times, None, None, 1)
    torch.testing.assert_close(z_next, schedule.add_noise(x, noise, times[-1]), atol=1e-4, rtol=1e-4)


def test_stages_of_any_number_are_trained_and_keep_the_contract(pipelines, tmp_path):
    more = ["--start_steps", 7, "--stages", 3, 2, "--steps_per_stage", 1]  # to the 2 steps of `quick`
    run_in_process(train_progressive, *quick(pipelines, tmp_path, *more))
    for folder, steps in (("stage-3", 3), ("final", 2)):
        contract, pipeline = read_json(tmp_path / folder / "distillation.json"), load_pipeline(tmp_path / folder)
        assert contract["steps"] == steps and len(contract["timesteps"]) == steps
        assert_contract(pipeline, pipeline.scheduler, contract, steps)


@pytest.mark.parametrize("kind", ["sd", "v"])
@pytest.mark.parametrize("steps", [64, 32, 16])
def test_contract_of_sampling_at_many_steps(kind, steps):
    pipeline = random_pipeline(kind)
    pipeline.set_progress_bar_config(disable=True)
    contract = {"guidance": "baked", "guidance_scale": 1.0, "target": "next"}
    assert_contract(pipeline, ddim_scheduler(pipeline.scheduler, steps), contract, steps)


def test_draws_depend_on_the_position_alone():
    args = SimpleNamespace(seed=0, guidance_min=2.0, guidance_max=5.0)
    noise, slots, scales = draw(args, 7, range(400), torch.zeros(400, 1, 2, 2), 4)
    assert slots.bincount().min() > 70 and scales.min() < 2.2 and scales.max() > 4.8
    assert 2 <= scales.min() and scales.max() <= 5
    again = draw(args, 7, range(100, 110), torch.zeros(10, 1, 2, 2), 4)
    assert all(torch.equal(a, b[100:110]) for a, b in zip(again, (noise, slots, scales)))


# Training


@pytest.mark.parametrize(
    "kind, more",
    [("v", []), ("sdxl", ["--loss_space", "x"]), ("sd", ["--lora_rank", 4]), ("sdxl", ["--lora_rank", 2])],
)
def test_every_stage_of_every_kind_keeps_the_contract(pipelines, tmp_path, kind, more):
    more = [*more, "--export", "fp16", "--validation_prompts", "a ring", "--validation_steps", 5]
    more += ["--gradient_checkpointing"]
    run_in_process(train_progressive, *quick(pipelines, tmp_path, *more, "--num_validation_images", 1, kind=kind))
    for folder, steps in (("stage-4", 4), ("stage-2", 2), ("final", 2)):
        contract = read_json(tmp_path / folder / "distillation.json")
        assert contract["steps"] == steps and contract["guidance"] == "baked" and contract["target"] == "next"
        if "--lora_rank" in more:
            pipeline = load_pipeline(pipelines(kind))
            saved = ddim_scheduler(pipeline.scheduler, steps).from_pretrained(tmp_path / folder, subfolder="scheduler")
            pipeline.load_lora_weights(tmp_path / folder)
        else:
            pipeline = load_pipeline(tmp_path / folder)
            saved = pipeline.scheduler
        assert_contract(pipeline, saved, contract, steps)
    assert (tmp_path / "samples" / "step-5.png").is_file()
    exported = load_pipeline(tmp_path / "final-fp16", torch.float16)
    assert student_timesteps(exported.scheduler, 2) == [999, 499]


def test_a_stage_starts_as_its_teacher_and_with_a_new_optimizer(uninterrupted):
    boundary = uninterrupted / "checkpoint-3"
    stage = load_file(uninterrupted / "stage-4/unet/diffusion_pytorch_model.safetensors")
    for name in ("student", "student_ema", "teacher"):
        tensors = load_file(boundary / f"{name}.safetensors")
        assert tensors.keys() == stage.keys() and all(torch.equal(tensors[key], stage[key]) for key in stage)
    assert not torch.load(boundary / "optimizer.bin", weights_only=True)["state"]
    inside, later = (load_file(uninterrupted / f"checkpoint-4/{name}.safetensors") for name in ("student", "teacher"))
    assert all(torch.equal(later[key], stage[key]) for key in stage)
    assert all(not torch.equal(inside[key], stage[key]) for key in stage)


def test_guidance_goes_into_the_first_halving_alone(pipelines, uninterrupted, tmp_path, monkeypatch):
    scales = []

    def spy(*arguments):
        scales.append(arguments[-1])
        return predict_guided(*arguments)

    monkeypatch.setattr(train_progressive, "predict_guided", spy)
    run_in_process(train_progressive, *quick(pipelines, tmp_path / "a", "--guidance_scale", 3))
    assert scales == [3.0] * 6  # two teacher steps in each of three updates
    scales.clear()
    # The student of 4 steps has its guidance inside: as a teacher it is not guided.
    pipeline = load_pipeline(uninterrupted / "stage-4")
    pipeline.save_pretrained(tmp_path / "baked")
    shutil.copy(uninterrupted / "stage-4" / "distillation.json", tmp_path / "baked")
    arguments = quick(lambda kind: tmp_path / "baked", tmp_path / "b", "--start_steps", 4)
    run_in_process(train_progressive, *arguments)
    assert not scales and read_json(tmp_path / "b/final/distillation.json")["guidance_scale"] == 1


def test_one_step_starts_from_noise_alone(pipelines, tmp_path, monkeypatch):
    calls = {"draw": [], "latents_of": [], "predict": []}

    def spy(name):
        original = getattr(train_progressive, name)

        def called(*arguments):
            result = original(*arguments)
            calls[name].append(result if name == "draw" else arguments[1])
            return result

        monkeypatch.setattr(train_progressive, name, called)

    for name in calls:
        spy(name)
    more = ["--start_steps", 4, "--end_steps", 1, "--steps_per_stage", 1, "--guidance_scale", 1]
    run_in_process(train_progressive, *quick(pipelines, tmp_path, *more))
    assert len(calls["latents_of"]) == 1  # in the stage of two steps
    teacher_starts, _, student_starts = calls["predict"][3:]
    noise, _, _ = calls["draw"][1]
    assert torch.equal(teacher_starts, noise) and torch.equal(student_starts, noise)


def test_a_teacher_with_guidance_as_an_input_keeps_it(pipelines, tmp_path):
    pipeline = load_pipeline(pipelines())
    pipeline.unet = with_guidance_input(pipeline.unet, 32)
    with torch.no_grad():
        pipeline.unet.time_embedding.cond_proj.weight.normal_(std=0.05)
    pipeline.save_pretrained(tmp_path / "embedded")
    write_distillation(tmp_path / "embedded", parent=pipelines(), guidance="embedded", guidance_scale=3.0)
    run_in_process(train_progressive, *quick(lambda kind: tmp_path / "embedded", tmp_path / "run"))
    contract = read_json(tmp_path / "run/final/distillation.json")
    assert contract["guidance"] == "embedded" and contract["guidance_scale"] == 3
    student = load_pipeline(tmp_path / "run/final")
    cond_proj = student.unet.time_embedding.cond_proj.weight
    assert not torch.equal(cond_proj, pipeline.unet.time_embedding.cond_proj.weight)
    for scale in (3.0, 7.5):
        assert_contract(student, student.scheduler, {**contract, "guidance_scale": scale}, 2)


def test_two_processes_are_one(pipelines, uninterrupted, tmp_path):
    fork_and_wait(tmp_path, SCRIPT, *quick(pipelines, tmp_path, "--batch_size", 2), processes=2)
    assert_same(tmp_path / "checkpoint-6", uninterrupted / "checkpoint-6", atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("number", [3, 4])
def test_resume_within_and_between_stages_bit_for_bit(pipelines, uninterrupted, tmp_path, number):
    """From another folder's copy of a checkpoint: the stage's teacher is in it too."""
    shutil.copytree(uninterrupted / f"checkpoint-{number}", tmp_path / f"checkpoint-{number}")
    run_in_process(train_progressive, *quick(pipelines, tmp_path, "--resume_from_checkpoint", "latest"))
    assert_same(tmp_path / "checkpoint-6", uninterrupted / "checkpoint-6")
    mine, whole = (load_pipeline(folder / "final").unet.state_dict() for folder in (tmp_path, uninterrupted))
    assert all(torch.equal(mine[name], whole[name]) for name in whole)


def test_a_lora_resumes_bit_for_bit_with_its_teacher_merged(pipelines, tmp_path, monkeypatch):
    """Every teacher but the first is the first with the LoRA of the stage before in its weights, resumed or not."""
    teachers, original = [], train_progressive.merged_teacher

    def spy(*arguments):
        teachers.append(original(*arguments))
        return teachers[-1]

    monkeypatch.setattr(train_progressive, "merged_teacher", spy)
    more = ["--lora_rank", 4, "--checkpointing_steps", 1, "--learning_rate", 1e-2, "--lr_warmup_steps", 0]
    run_in_process(train_progressive, *quick(pipelines, tmp_path / "whole", *more))
    shutil.copytree(tmp_path / "whole/checkpoint-4", tmp_path / "resumed/checkpoint-4")
    resume = [*more, "--resume_from_checkpoint", "latest"]
    run_in_process(train_progressive, *quick(pipelines, tmp_path / "resumed", *resume))
    assert_same(tmp_path / "resumed/checkpoint-6", tmp_path / "whole/checkpoint-6")

    pipeline = load_pipeline(pipelines("sd"))
    z, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([999, 249])
    conditioning = encode_prompts(pipeline, ["a ring", "a cross"], 32)
    names = pipeline.unet.state_dict().keys()
    with torch.no_grad():
        unguided = predict(pipeline.unet, z, t, conditioning)
        pipeline.load_lora_weights(tmp_path / "whole/stage-4")
        expected = predict(pipeline.unet, z, t, conditioning)
        assert not torch.allclose(expected, unguided, atol=1e-3)
        after_stage_4, resumed = teachers  # none after the last stage
        for teacher in (after_stage_4, resumed):
            assert teacher.state_dict().keys() == names and not any(p.requires_grad for p in teacher.parameters())
            torch.testing.assert_close(predict(teacher, z, t, conditioning), expected, atol=1e-5, rtol=1e-5)


def test_the_cap_ends_a_run_within_a_stage_and_a_larger_one_goes_on(pipelines, uninterrupted, tmp_path, capsys):
    """Bit for bit, and without a warning: the learning rate follows the stage's length."""
    run_in_process(train_progressive, *quick(pipelines, tmp_path, "--max_steps", 4))
    said = capsys.readouterr().out
    assert "Ended by --max_train_steps after step 4 of 6, 1 of them in the stage of 2 steps" in said
    assert "Done" not in said and not (tmp_path / "final").exists()
    assert_same(tmp_path / "checkpoint-4", uninterrupted / "checkpoint-4")
    run_in_process(
        train_progressive, *quick(pipelines, tmp_path, "--max_steps", 5, "--resume_from_checkpoint", "latest")
    )
    run_in_process(train_progressive, *quick(pipelines, tmp_path, "--resume_from_checkpoint", "latest"))
    assert_same(tmp_path / "checkpoint-6", uninterrupted / "checkpoint-6")
    said = capsys.readouterr().out
    assert "warning" not in said and f"Done: {tmp_path / 'final'}" in said and (tmp_path / "final").is_dir()


def test_a_cap_at_the_end_of_a_stage_leaves_the_stage(pipelines, uninterrupted, tmp_path, capsys):
    run_in_process(train_progressive, *quick(pipelines, tmp_path, "--max_train_steps", 3))
    assert "after step 3 of 6, 0 of them in the stage of 2 steps" in capsys.readouterr().out
    assert (tmp_path / "stage-4").is_dir() and not (tmp_path / "final").exists()
    assert_same(tmp_path / "checkpoint-3", uninterrupted / "checkpoint-3")


@pytest.mark.parametrize("lora", [[], ["--lora_rank", 4]])
def test_the_last_checkpoint_gives_its_output_in_another_folder(pipelines, uninterrupted, tmp_path, lora, capsys):
    whole = uninterrupted
    if lora:
        whole = tmp_path / "whole"
        run_in_process(train_progressive, *quick(pipelines, whole, *lora))
    resume = [*lora, "--resume_from_checkpoint", whole / "checkpoint-6"]
    run_in_process(train_progressive, *quick(pipelines, tmp_path / "new", *resume))
    file = "pytorch_lora_weights.safetensors" if lora else "unet/diffusion_pytorch_model.safetensors"
    mine, theirs = (load_file(run / "final" / file) for run in (tmp_path / "new", whole))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)
    contracts = [read_json(run / "final/distillation.json") for run in (tmp_path / "new", whole)]
    assert contracts[0] == contracts[1] and contracts[0]["steps"] == 2
    command = f"--trained_steps --steps 8 2 --models {pipelines()} {tmp_path / 'new/final'}"  # no stage is here
    assert command in capsys.readouterr().out


def test_a_stage_that_ends_on_a_loss_that_is_not_finite_is_no_teacher(pipelines, tmp_path, monkeypatch):
    losses = []

    def broken(*arguments):
        losses.append(progressive_loss(*arguments) * (float("nan") if len(losses) == 2 else 1))
        return losses[-1]

    monkeypatch.setattr(train_progressive, "progressive_loss", broken)
    with pytest.raises(UsageError, match="the loss of step 3 is not finite"):
        run_in_process(train_progressive, *quick(pipelines, tmp_path / "a", "--checkpointing_steps", 1))
    assert {path.name for path in (tmp_path / "a").iterdir() if path.is_dir()} == {"checkpoint-1", "checkpoint-2"}
    # Where the guard against skipped updates ends the run first, its checkpoint is no start of the next stage.
    losses.clear()
    guard = ["--max_skipped_updates", 1]
    with pytest.raises(UsageError, match="1 updates of the student in a row"):
        run_in_process(train_progressive, *quick(pipelines, tmp_path / "b", *guard))
    with pytest.raises(CheckpointError, match="checkpoint-3 is of the end of a stage"):
        run_in_process(
            train_progressive, *quick(pipelines, tmp_path / "b", *guard, "--resume_from_checkpoint", "latest")
        )


@pytest.mark.parametrize("lora", [[], ["--lora_rank", 4]])
def test_a_variant_is_the_teacher_of_every_stage_and_is_exported(pipelines, tmp_path, lora):
    load_pipeline(pipelines()).save_pretrained(tmp_path / "variant", variant="fp16")
    more = [*lora, "--variant", "fp16", "--export", "fp16", "--steps_per_stage", 1]
    run_in_process(train_progressive, *quick(lambda kind: tmp_path / "variant", tmp_path / "run", *more))
    contract = read_json(tmp_path / "run/final-fp16/distillation.json")
    assert contract["variant"] == "fp16" and contract["steps"] == 2
    exported = load_pipeline(tmp_path / "run/final-fp16", torch.float16)
    assert_contract(exported.to(dtype=torch.float32), exported.scheduler, contract, 2)


def test_bf16_learns_from_merged_teachers(pipelines, tmp_path, monkeypatch):
    teachers, original = [], train_progressive.merged_teacher
    monkeypatch.setattr(train_progressive, "merged_teacher", lambda *a: teachers.append(original(*a)) or teachers[-1])
    run_in_process(train_progressive, *quick(pipelines, tmp_path, "--lora_rank", 4, "--mixed_precision", "bf16"))
    assert [teacher.dtype for teacher in teachers] == [torch.bfloat16]
    tensors = checkpoint_tensors(tmp_path / "checkpoint-6", "student")
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in tensors.values())


# Mistakes

MISTAKES = [
    (["--start_steps", "12", "--end_steps", "5"], "--start_steps 12 is not --end_steps 5 times a power of two"),
    (["--start_steps", "2", "--end_steps", "4"], "--start_steps 2 is not more than --end_steps 4"),
    (["--start_steps", "4", "--end_steps", "4"], "--start_steps 4 is not more than --end_steps 4"),
    (["--stages", "4", "3"], "--end_steps 2: --stages end at 3"),
    (["--stages", "7", "2"], "--stages: from 8 steps to 7 is no stage"),
    (["--start_steps", "999", "--stages", "600", "2"], "the teacher would take 1200"),
    (["--last_stages_steps", "1", "2", "3"], "--last_stages_steps has 3 numbers"),
    (["--guidance_max", "5"], "--guidance_min and --guidance_max are about a teacher that takes"),
]


@pytest.mark.parametrize("wrong, said", MISTAKES, ids=[" ".join(wrong) for wrong, _ in MISTAKES])
def test_mistakes_are_one_sentence(pipelines, tmp_path, capsys, wrong, said):
    error = error_of(train_progressive, quick(pipelines, tmp_path, *wrong), capsys)
    assert said in error and error.startswith("error: ") and error.count("\n") == 1


FEW = {"guidance": "baked", "steps": 4, "timesteps": [999, 749, 499, 249]}
TEACHERS = [
    ({**FEW, "target": "x0"}, [], "predicts and re-noises"),
    ({**FEW, "target": "next"}, [], "made for 4 steps: add --start_steps 4"),
    (
        {**FEW, "target": "next"},
        ["--start_steps", 4, "--guidance_scale", 3],
        "--guidance_scale 3: its guidance is baked",
    ),
    ({"guidance": "embedded"}, ["--guidance_scale", 3], "--guidance_min and --guidance_max say"),
    ({"guidance": "embedded"}, ["--guidance_min", 5, "--guidance_max", 2], "--guidance_min 5 is above"),
]


@pytest.mark.parametrize("contract, flags, said", TEACHERS, ids=[said for _, _, said in TEACHERS])
def test_teachers_that_do_not_fit_are_refused(pipelines, tmp_path, capsys, contract, flags, said):
    teacher = shutil.copytree(pipelines(), tmp_path / "teacher")
    write_distillation(teacher, guidance_scale=1.0, **contract)
    error = error_of(train_progressive, quick(lambda kind: teacher, tmp_path / "out", *flags), capsys)
    assert said in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    "flag, value", [("--start_steps", "1024"), ("--guidance_scale", "-1"), ("--guidance_min", "-1")]
)
def test_numbers_out_of_range_are_refused(capsys, flag, value):
    with pytest.raises(SystemExit):
        train_progressive.parse_args([flag, value])
    assert f"argument {flag}" in capsys.readouterr().err


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("lora", [[], ["--lora_rank", 4]])
def test_fp16_trains_and_resumes(pipelines, tmp_path, gpu, lora):
    fp16 = ["--mixed_precision", "fp16", *lora]
    run_in_process(train_progressive, *quick(pipelines, tmp_path / "a", *fp16))
    shutil.copytree(tmp_path / "a/checkpoint-4", tmp_path / "b/checkpoint-4")
    run_in_process(train_progressive, *quick(pipelines, tmp_path / "b", *fp16, "--resume_from_checkpoint", "latest"))
    tensors = checkpoint_tensors(tmp_path / "b/checkpoint-6", "student")
    assert all(value.isfinite().all() for value in tensors.values())
