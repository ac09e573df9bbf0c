"""train_lcm.py: its consistency function, grid and draws, the contract of sampling, resume, output and mistakes."""

import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import random_pipeline, read_json, run_in_process
from contract import assert_contract
from diffusers import LCMScheduler
from launching import assert_same_checkpoints, error_of, images_in_memory, own_guidance, quick
from safetensors.torch import load_file

import train_lcm
from common.contract import write_distillation
from common.diffusion import NoiseSchedule, boundary_scalings, consistency_function, phase_grid
from common.pipelines import load_pipeline
from common.schedulers import saved_scheduler, student_scheduler, student_timesteps
from train_lcm import draw, lcm_loss

LORA = ["--lora_rank", 4]
assert_same = partial(assert_same_checkpoints, name="student")


@pytest.fixture(scope="module")
def uninterrupted(pipelines, tmp_path_factory):
    """Four steps of a full UNet in one go, global batch 4, with a checkpoint after every one."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_in_process(train_lcm, *quick(pipelines, folder, "--checkpointing_steps", 1, steps=4))
    return folder


@pytest.fixture(scope="module")
def uninterrupted_lora(pipelines, tmp_path_factory):
    """The same of a LoRA, with phases and v-prediction."""
    folder = tmp_path_factory.mktemp("uninterrupted_lora")
    more = [*LORA, "--num_phases", 4, "--checkpointing_steps", 2]
    run_in_process(train_lcm, *quick(pipelines, folder, *more, kind="v", steps=4))
    return folder


# The method


@pytest.mark.parametrize("kind", ["sd", "v"])
def test_at_its_end_a_path_has_arrived(kind):
    """f(z, 0) = z, also below 0, the clean end; with phases f(z, e) = z: exactly, whatever the output."""
    schedule = NoiseSchedule(random_pipeline(kind).scheduler)
    z, output = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
    assert torch.equal(consistency_function(output, z, torch.tensor([0, -1, 0, -1]), schedule), z)
    edges = torch.tensor([749, 499, 249, -1])
    assert torch.equal(consistency_function(output, z, edges, schedule, edges), z)
    # And near an edge f is near z, so that nothing jumps there.
    near = consistency_function(output, z, edges + 1, schedule, edges)
    assert (near - z).abs().max() < 0.2
    assert (consistency_function(output, z, torch.full((4,), 999), schedule, edges) - z).abs().max() > 0.5


def test_scalings_are_those_of_lcm_scheduler():
    scheduler = student_scheduler(random_pipeline("sd").scheduler, "x0", 4)
    timesteps = torch.tensor([0, 1, 19, 259, 999])
    ours = boundary_scalings(timesteps)
    theirs = zip(*(scheduler.get_scalings_for_boundary_condition_discrete(int(t)) for t in timesteps))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.flatten(), torch.tensor(b), atol=0, rtol=1e-6)


@pytest.mark.parametrize("kind", ["sd", "v"])
@pytest.mark.parametrize("phases", [1, 4])
def test_the_loss_is_zero_where_the_model_is_consistent(kind, phases):
    """Where the data is one image x, the right output is known, and the teacher's step stays on the path to x."""
    schedule = NoiseSchedule(random_pipeline(kind).scheduler)
    starts = student_timesteps(student_scheduler(random_pipeline(kind).scheduler, "next", phases), phases)
    t, s, edges = (times[::5] for times in phase_grid(torch.tensor([*starts, -1]), 50))
    x, noise = torch.randn(2, len(t), 4, 8, 8)

    def right(z, t):
        return schedule.target(x, (z - schedule.alpha(t) * x) / schedule.sigma(t).clamp(min=1e-3), t)

    z = schedule.add_noise(x, noise, t)
    z_next = schedule.ddim_step(right(z, t), z, t, s)
    points = z, t, right(z_next, s), z_next, s, schedule, edges if phases > 1 else None
    for loss in ("l2", "huber"):
        assert lcm_loss(right(z, t), *points, loss) < 1e-6
        assert lcm_loss(right(z, t) + 0.1, *points, loss) > 1e-4


def test_the_loss_is_the_distance_and_the_target_gets_no_gradient():
    schedule = NoiseSchedule(random_pipeline("sd").scheduler)
    z, z_next = torch.randn(2, 2, 4, 8, 8)
    output, target_output = (torch.randn(2, 4, 8, 8, requires_grad=True) for _ in range(2))
    t, s = torch.tensor([999, 19]), torch.tensor([979, -1])
    target = torch.stack([schedule.to_x0(target_output, z_next, s)[0], z_next[1]])  # c_skip is 3e-9 at 979
    error = schedule.to_x0(output, z, t) - target
    points = output, z, t, target_output, z_next, s, schedule
    torch.testing.assert_close(lcm_loss(*points, loss="l2"), error.square().mean(), rtol=1e-4, atol=0)
    huber = ((error.square() + 1e-6).sqrt() - 1e-3).mean()
    torch.testing.assert_close(lcm_loss(*points), huber, rtol=1e-4, atol=0)
    lcm_loss(*points).backward()
    assert output.grad.abs().sum() > 0 and target_output.grad is None


@pytest.mark.parametrize("grid", [40, 50])
def test_every_step_count_samples_at_trained_timesteps(grid):
    scheduler = student_scheduler(random_pipeline("sd").scheduler, "x0", 4, grid)
    starts, ends, edges = phase_grid(torch.tensor([999, -1]), grid)
    assert starts.tolist() == student_timesteps(scheduler, grid) == list(range(999, -1, -1000 // grid))
    assert ends.tolist() == [*starts[1:].tolist(), -1] and set(edges.tolist()) == {-1}
    for steps in (1, 2, 4, 8):
        assert set(student_timesteps(scheduler, steps)) <= set(starts.tolist())


@pytest.mark.parametrize("phases", [2, 3, 4, 8])
def test_teacher_steps_stay_in_their_phase(phases):
    times = student_timesteps(student_scheduler(random_pipeline("sd").scheduler, "next", phases), phases)
    starts, ends, edges = phase_grid(torch.tensor([*times, -1]), 50)
    assert len(starts) == 50 // phases * phases and (ends < starts).all() and (edges <= ends).all()
    assert starts.tolist()[:: 50 // phases] == times  # every phase begins where the student samples
    assert torch.equal(starts[1:], ends[:-1])  # and no timestep is left out
    assert edges.unique().tolist() == sorted([*times[1:], -1])


def test_draws_follow_from_the_position():
    args = SimpleNamespace(seed=0)
    noise, slots, shares = draw(args, 7, range(2000), torch.zeros(2000, 1, 2, 2), 50)
    torch.testing.assert_close(slots.bincount(minlength=50) / 2000, torch.full((50,), 0.02), atol=0.02, rtol=0)
    assert 0 <= shares.min() and shares.max() < 1 and abs(shares.mean() - 0.5) < 0.03
    again = draw(args, 7, range(1000, 1010), torch.zeros(10, 1, 2, 2), 50)
    for mine, all_of_them in zip(again, (noise, slots, shares)):
        assert torch.equal(mine, all_of_them[1000:1010])


# Training


CASES = [
    ("v", [*LORA, "--loss", "l2"], 8),
    ("sdxl", [*LORA, "--num_phases", 3], None),  # 3 does not divide 1000: not DDIMScheduler
    ("v", ["--guidance_scale", 3], 1),
    ("sdxl", ["--num_phases", 2, "--target_ema_decay", 0.5], None),
]


@pytest.mark.parametrize("kind, flags, other_steps", CASES, ids=[f"{c[0]} {' '.join(map(str, c[1]))}" for c in CASES])
def test_every_kind_of_model_trains_and_keeps_the_contract(pipelines, tmp_path, kind, flags, other_steps):
    run_in_process(
        train_lcm,
        *quick(
            pipelines,
            tmp_path,
            *flags,
            "--gradient_checkpointing",
            "--export",
            "fp16",
            "--validation_prompts",
            "a ring",
            "--validation_steps",
            1,
            "--num_validation_images",
            1,
            kind=kind,
            steps=1,
        ),
    )
    final, lora, phases = tmp_path / "final", "--lora_rank" in flags, other_steps is None
    contract = read_json(final / "distillation.json")
    assert contract["method"] == "lcm" and contract["parent"] == pipelines(kind)
    assert contract["target"] == ("next" if phases else "x0")
    assert phases or contract["timesteps"] == [999, 759, 499, 259]
    scale = 3.0 if "--guidance_scale" in flags else own_guidance(kind)
    assert (contract["guidance"], contract["guidance_scale"]) == (("baked", 1.0) if lora else ("embedded", scale))
    pipeline = load_pipeline(pipelines(kind) if lora else final)
    if lora:
        pipeline.load_lora_weights(final)
        pipeline.scheduler = saved_scheduler(final)
    saved = pipeline.scheduler
    for steps in (contract["steps"], other_steps or contract["steps"]):
        assert_contract(pipeline, saved, contract, steps)
    if not lora:  # the scale is an input
        assert_contract(pipeline, saved, {**contract, "guidance_scale": 5.0}, contract["steps"])
    assert (tmp_path / "samples" / "step-1.png").is_file()
    exported = load_pipeline(tmp_path / "final-fp16", dtype=torch.float16)
    assert type(exported.scheduler) is type(saved)
    assert student_timesteps(exported.scheduler, contract["steps"]) == contract["timesteps"]
    names = {path.name for path in final.iterdir()}
    assert ("pytorch_lora_weights.safetensors" if lora else "model_index.json") in names
    guided = f"{scale:g}" if lora else f"{scale / 2:g} to {2 * scale:g}, an input"
    assert f"phases: {contract['steps'] if phases else 1}, guided at {guided}" in (final / "README.md").read_text()


def test_a_lora_is_teacher_target_and_student_by_turns(pipelines, tmp_path, monkeypatch):
    """One UNet: its adapters are off for the teacher alone, and gradients are on for the student alone."""
    calls = []

    def spy(name):
        original = getattr(train_lcm, name)

        def predict(unet, *arguments):
            layer = next(module for module in unet.modules() if hasattr(module, "lora_A"))
            calls.append((name, id(unet), not layer.disable_adapters, torch.is_grad_enabled()))
            return original(unet, *arguments)

        monkeypatch.setattr(train_lcm, name, predict)

    spy("predict"), spy("predict_guided")
    run_in_process(train_lcm, *quick(pipelines, tmp_path, *LORA, steps=1))
    turns = [(name, on, gradient) for name, _, on, gradient in calls]
    assert turns == [("predict_guided", False, False), ("predict", True, False), ("predict", True, True)]
    assert len({unet for _, unet, _, _ in calls}) == 1


def test_the_target_is_the_slow_average_of_the_full_unet(pipelines, uninterrupted):
    """From the teacher on, with a new guidance input of zeros; decay 0.95 from the first step on."""
    target = {**load_pipeline(pipelines()).unet.state_dict()}
    new = "time_embedding.cond_proj.weight"
    for step in (1, 2, 3, 4):
        folder = uninterrupted / f"checkpoint-{step}"
        student, saved = load_file(folder / "student.safetensors"), load_file(folder / "target.safetensors")
        target.setdefault(new, torch.zeros_like(student[new]))
        target = {name: 0.95 * value + 0.05 * student[name] for name, value in target.items()}
        for name, value in target.items():
            torch.testing.assert_close(saved[name], value, atol=1e-7, rtol=1e-5)
    assert student[new].abs().max() > 0
    final = load_file(uninterrupted / "final/unet/diffusion_pytorch_model.safetensors")
    average = load_file(folder / "student_ema.safetensors")
    assert final.keys() == average.keys() and all(torch.equal(final[name], average[name]) for name in final)


def test_a_baked_teacher_is_not_guided_again(pipelines, tmp_path, monkeypatch):
    teacher = shutil.copytree(pipelines(), tmp_path / "teacher")
    (teacher / "distillation.json").write_text('{"guidance": "baked", "guidance_scale": 1.0}')
    widths = []
    original = train_lcm.predict
    monkeypatch.setattr(train_lcm, "predict", lambda unet, z, *a: widths.append(len(z)) or original(unet, z, *a))
    monkeypatch.setattr("common.conditioning.predict", train_lcm.predict)
    run_in_process(train_lcm, *quick(lambda kind: teacher, tmp_path / "out", steps=1))
    assert widths == [4, 4, 4]  # teacher, target, student: no pass is doubled
    assert read_json(tmp_path / "out/final/distillation.json")["guidance"] == "baked"
    assert load_pipeline(tmp_path / "out/final").unet.config.time_cond_proj_dim is None


def test_the_target_network_resumes(pipelines, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted / "checkpoint-2", tmp_path / "checkpoint-2")
    resume = ["--checkpointing_steps", 2, "--resume_from_checkpoint", "latest"]
    run_in_process(train_lcm, *quick(pipelines, tmp_path, *resume, steps=4))
    assert_same(tmp_path / "checkpoint-4", uninterrupted / "checkpoint-4")
    resumed, target = (load_file(run / "checkpoint-4/target.safetensors") for run in (tmp_path, uninterrupted))
    assert resumed.keys() == target.keys() and all(torch.equal(resumed[name], target[name]) for name in target)


def test_a_lora_with_phases_resumes(pipelines, uninterrupted_lora, tmp_path):
    shutil.copytree(uninterrupted_lora / "checkpoint-2", tmp_path / "checkpoint-2")
    more = [*LORA, "--num_phases", 4, "--checkpointing_steps", 2, "--resume_from_checkpoint", "latest"]
    run_in_process(train_lcm, *quick(pipelines, tmp_path, *more, kind="v", steps=4))
    assert_same(tmp_path / "checkpoint-4", uninterrupted_lora / "checkpoint-4")


def test_a_lora_checkpoint_holds_no_base_model(uninterrupted_lora):
    names = {path.name for path in (uninterrupted_lora / "checkpoint-4").iterdir()}
    assert names == {"student.safetensors", "student_ema.safetensors", "optimizer.bin", "state.json"}
    assert all("lora" in name for name in load_file(uninterrupted_lora / "checkpoint-4/student.safetensors"))


def test_the_scale_of_a_full_unet_is_an_input(uninterrupted):
    pipeline = load_pipeline(uninterrupted / "final")
    assert isinstance(pipeline.scheduler, LCMScheduler)
    assert pipeline.scheduler.config.original_inference_steps == 50
    assert not torch.equal(images_in_memory(pipeline, 4), images_in_memory(pipeline, 4, guidance_scale=7.5))


# Mistakes

MISTAKES = [
    (["--num_ddim_steps", "30"], "--num_ddim_steps 30"),
    (["--num_ddim_timesteps", "2"], "--num_inference_steps 4 is more than --num_ddim_steps 2"),
    (["--num_inference_steps", "100"], "--num_inference_steps 100"),
    (["--num_phases", "100"], "--num_phases 100"),
    (["--num_phases", "4", "--num_inference_steps", "2"], "--num_inference_steps 2"),
    (["--guidance_scale", "0.5"], "--guidance_scale 0.5"),  # the range is from 1 on
    (["--guidance_min", "8"], "--guidance_min 8"),
    (["--guidance_max", "7"], "--guidance_max 7"),
    (["--lora_rank", "4", "--guidance_max", "9"], "--guidance_max"),
    (["--lora_rank", "4", "--target_ema_decay", "0.9"], "--target_ema_decay"),
    (["--lora_alpha", "4"], "--lora_alpha"),
]


@pytest.mark.parametrize("wrong, said", MISTAKES, ids=[" ".join(wrong) for wrong, _ in MISTAKES])
def test_mistakes_are_one_sentence(pipelines, tmp_path, capsys, wrong, said):
    error = error_of(train_lcm, quick(pipelines, tmp_path, *wrong), capsys)
    assert said in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("flag, value", [("--guidance_scale", "-1"), ("--guidance_max", "inf")])
def test_scales_are_numbers_from_0_on(capsys, flag, value):
    with pytest.raises(SystemExit):
        train_lcm.parse_args([flag, value])
    assert f"argument {flag}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "contract, flags, said",
    [
        ({"guidance": "embedded"}, [], "an input of its UNet already"),
        ({"guidance": "baked", "timesteps": [999, 499]}, [], "for 2 steps"),
        ({"guidance": "baked"}, ["--guidance_scale", 3], "--guidance_scale 3"),
        ({"guidance": "baked"}, ["--guidance_max", 3], "--guidance_max"),
    ],
)
def test_teachers_that_do_not_fit_are_refused(pipelines, tmp_path, capsys, contract, flags, said):
    teacher = shutil.copytree(pipelines(), tmp_path / "teacher")
    write_distillation(teacher, guidance_scale=1.0, **contract)
    error = error_of(train_lcm, quick(lambda kind: teacher, tmp_path / "out", *flags), capsys)
    assert said in error and error.startswith("error: ") and error.count("\n") == 1


# On a GPU


@pytest.mark.gpu
def test_8bit_adam_trains(pipelines, tmp_path, gpu):
    run_in_process(train_lcm, *quick(pipelines, tmp_path, "--use_8bit_adam"))
    tensors = load_file(tmp_path / "checkpoint-2/student.safetensors")
    assert all(value.isfinite().all() for value in tensors.values())
