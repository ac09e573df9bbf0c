"""The diffusion maths against diffusers' schedulers and against its own identities."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, LCMScheduler, PNDMScheduler

from common.diffusion import NoiseSchedule, ddim_rollout, teacher_timesteps
from common.schedulers import ddim_scheduler, student_scheduler, student_timesteps

SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)


def scheduler_of(prediction_type):
    return DDPMScheduler(**SD, prediction_type=prediction_type)


def random_latents(batch_size=6, seed=0):
    return torch.randn(batch_size, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_conversions_recover_x0_and_noise(prediction_type):
    schedule = NoiseSchedule(scheduler_of(prediction_type))
    x, noise = random_latents(seed=1), random_latents(seed=2)
    timesteps = torch.tensor([0, 1, 249, 499, 749, 999])
    z = schedule.add_noise(x, noise, timesteps)
    output = {
        "epsilon": noise,
        "v_prediction": schedule.alpha(timesteps) * noise - schedule.sigma(timesteps) * x,
        "sample": x,
    }[prediction_type]
    torch.testing.assert_close(schedule.to_x0(output, z, timesteps), x, atol=1e-5, rtol=1e-4)
    # At t = 0 the noise is divided by sigma = 0.029, so its error is the largest there.
    torch.testing.assert_close(schedule.to_epsilon(output, z, timesteps), noise, atol=1e-4, rtol=1e-4)


def test_add_noise_is_diffusers():
    scheduler = scheduler_of("epsilon")
    x, noise, timesteps = random_latents(seed=1), random_latents(seed=2), torch.tensor([0, 1, 249, 499, 749, 999])
    ours = NoiseSchedule(scheduler).add_noise(x, noise, timesteps)
    torch.testing.assert_close(ours, scheduler.add_noise(x, noise, timesteps), atol=1e-6, rtol=1e-6)


def test_half_precision_outputs_are_converted_in_fp32():
    schedule = NoiseSchedule(scheduler_of("epsilon"))
    half = random_latents().half()
    assert schedule.to_x0(half, half, torch.full((6,), 999)).dtype == torch.float32


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 20])
def test_ddim_step_is_diffusers_step(prediction_type, steps):
    scheduler = ddim_scheduler(scheduler_of(prediction_type), steps)
    assert isinstance(scheduler, DDIMScheduler)
    schedule = NoiseSchedule(scheduler)
    scheduler.set_timesteps(steps)
    timesteps = [int(t) for t in scheduler.timesteps]
    z, output = random_latents(seed=3), random_latents(seed=4)
    for now, after in zip(timesteps, [*timesteps[1:], -1]):
        ours = schedule.ddim_step(output, z, torch.full((6,), now), torch.full((6,), after))
        theirs = scheduler.step(output, now, z).prev_sample
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [16, 64, 128])
def test_steps_that_do_not_divide_1000_roll_out_alike(prediction_type, steps):
    scheduler = ddim_scheduler(scheduler_of(prediction_type), steps)
    schedule = NoiseSchedule(scheduler)
    timesteps = student_timesteps(scheduler, steps)
    scheduler.set_timesteps(steps)
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) * 0.2

    def model(z, t):
        return torch.einsum("oc,bchw->bohw", weight, z.tanh()) * (1 + t.view(-1, 1, 1, 1) / 1000)

    ours = theirs = random_latents(seed=5)
    for now, after in zip(timesteps, [*timesteps[1:], -1]):
        t = torch.full((6,), now)
        ours = schedule.ddim_step(model(ours, t), ours, t, torch.full((6,), after))
    for now in scheduler.timesteps:
        theirs = scheduler.step(model(theirs, now.expand(6)), now, theirs).prev_sample
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("target", ["x0", "next"])
def test_student_timesteps_are_trailing(target):
    trailing = {1: [999], 2: [999, 499], 4: [999, 749, 499, 249], 8: [999, 874, 749, 624, 499, 374, 249, 124]}
    for steps, expected in trailing.items():
        scheduler = student_scheduler(scheduler_of("epsilon"), target, steps)
        assert student_timesteps(scheduler, steps) == expected


def test_student_scheduler_drops_the_teachers_sampling_options():
    teacher = PNDMScheduler(
        **{k: v for k, v in SD.items() if k != "clip_sample"},
        skip_prk_steps=True,
        steps_offset=1,
        set_alpha_to_one=False,
        prediction_type="v_prediction",
    )
    for target, kind in (("x0", LCMScheduler), ("next", DDIMScheduler)):
        scheduler = student_scheduler(teacher, target, 4)
        assert isinstance(scheduler, kind)
        assert scheduler.config.prediction_type == "v_prediction"
        assert scheduler.config.set_alpha_to_one and not scheduler.config.clip_sample
        # Not the teacher's: LCM has none, and of DDIM, whose trailing timesteps have none, stock pipelines want 1.
        assert scheduler.config.steps_offset == (0 if type(scheduler) is LCMScheduler else 1)


def test_teacher_grid():
    timesteps, ends = torch.tensor([999, 249, 3]), torch.tensor([-1, -1, -1])
    grid = teacher_timesteps(timesteps, ends, 8)
    assert grid[0].tolist() == [999, 249, 3] and grid[-1].tolist() == [-1, -1, -1]
    assert grid[:, 0].tolist() == [999, 874, 749, 624, 499, 374, 249, 124, -1]
    assert (grid.diff(dim=0) <= 0).all()
    between = teacher_timesteps(torch.tensor([999]), torch.tensor([749]), 5)
    assert between[:, 0].tolist() == [999, 949, 899, 849, 799, 749]


def test_batched_rollout_is_the_per_sample_rollout():
    schedule = NoiseSchedule(scheduler_of("epsilon"))
    timesteps, ends = torch.tensor([999, 749, 249, 3, 999, 1]), torch.tensor([-1, 499, -1, -1, 749, -1])
    z = random_latents(seed=6)

    def model(z, t, rows):
        return z.tanh() * (0.5 + t.view(-1, 1, 1, 1) / 1000)

    together = ddim_rollout(model, schedule, z, timesteps, ends, 8)
    for i in range(6):
        alone = ddim_rollout(model, schedule, z[i : i + 1], timesteps[i : i + 1], ends[i : i + 1], 8)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-6, rtol=1e-6)


def test_rollout_with_the_true_noise_returns_the_clean_latents():
    schedule = NoiseSchedule(scheduler_of("epsilon"))
    x, noise, timesteps = random_latents(seed=1), random_latents(seed=2), torch.tensor([999, 749, 499, 249, 100, 2])
    z = schedule.add_noise(x, noise, timesteps)
    end = ddim_rollout(
        lambda z, t, rows: noise if rows is None else noise[rows], schedule, z, timesteps, torch.full((6,), -1), 8
    )
    torch.testing.assert_close(end, x, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_x0_of_step_inverts_a_ddim_step(prediction_type):
    schedule = NoiseSchedule(scheduler_of(prediction_type))
    now, after = torch.tensor([999, 749, 499, 249, 999, 10]), torch.tensor([749, 499, 249, -1, -1, 0])
    z, output = random_latents(seed=3), random_latents(seed=4)
    x0 = schedule.x0_of_step(schedule.ddim_step(output, z, now, after), z, now, after)
    # The difference of two nearby schedules divides by little: relative to x0, whose size is up to 14.
    torch.testing.assert_close(x0, schedule.to_x0(output, z, now), atol=5e-3, rtol=1e-3)


def test_unknown_prediction_type_is_one_sentence():
    with pytest.raises(ValueError, match="prediction_type is 'flow'"):
        scheduler = scheduler_of("epsilon")
        scheduler.register_to_config(prediction_type="flow")
        NoiseSchedule(scheduler)
