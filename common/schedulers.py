"""Schedulers: those that are saved with students, the timesteps they take, and the one that belongs to an output."""

import json
from pathlib import Path

import diffusers
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler

from common.contract import file_metadata
from common.errors import UsageError


def student_scheduler(scheduler, target, num_inference_steps, grid=None):
    """The scheduler saved with a few-step student of `target` "x0" (predict, re-noise) or "next" (deterministic).

    Trailing timesteps, no clipping (latents are not in [-1, 1]), ending at alpha = 1. grid: of "x0", how many evenly
    spaced timesteps there are to take them from (default: every training timestep).
    """
    if target == "x0":
        # LCMScheduler ignores timestep_spacing: only with every training timestep as its original schedule do
        # 1, 2, 4, 8 steps land on the trailing ones.
        return LCMScheduler.from_config(
            _schedule_config(scheduler),
            clip_sample=False,
            set_alpha_to_one=True,
            original_inference_steps=grid or scheduler.config.num_train_timesteps,
        )
    return ddim_scheduler(scheduler, num_inference_steps)


def ddim_scheduler(scheduler, num_inference_steps):
    """A deterministic trailing scheduler for N steps: DDIM, or its first-order ODE twin where DDIM misses timesteps.

    DDIMScheduler steps to t - T // N whatever the next listed timestep is, so it is right only where N divides T.
    """
    if scheduler.config.num_train_timesteps % num_inference_steps == 0:
        return DDIMScheduler.from_config(
            _schedule_config(scheduler),
            timestep_spacing="trailing",
            clip_sample=False,
            set_alpha_to_one=True,
            steps_offset=1,
        )  # trailing timesteps have none; stock pipelines complain of 0
    return DPMSolverMultistepScheduler.from_config(
        _schedule_config(scheduler), solver_order=1, timestep_spacing="trailing", final_sigmas_type="zero"
    )


def _schedule_config(scheduler):
    """Only what defines the noise schedule: sampling options of another scheduler class must not leak through."""
    names = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "prediction_type",
        "rescale_betas_zero_snr",
    )
    return {name: scheduler.config[name] for name in names if name in scheduler.config}


def student_timesteps(scheduler, num_inference_steps):
    """The timesteps that `scheduler`, the one that will be saved, uses for N steps: a descending list of N ints."""
    copy = type(scheduler).from_config(scheduler.config)
    copy.set_timesteps(num_inference_steps)
    timesteps = [int(t) for t in copy.timesteps]
    if len(timesteps) != num_inference_steps:
        raise ValueError(
            f"{type(scheduler).__name__} gives {len(timesteps)} timesteps for {num_inference_steps} steps"
        )
    return timesteps


def shorter_schedules(scheduler, num_inference_steps):
    """The step counts up to N whose timesteps are among those of N: in them a re-noising student samples too."""
    known = set(student_timesteps(scheduler, num_inference_steps))
    counts = range(1, num_inference_steps + 1)
    return [count for count in counts if known.issuperset(student_timesteps(scheduler, count))]


def saved_scheduler(folder):
    """The scheduler that a LoRA carries: in its folder, or in the header of its one file."""
    carried = file_metadata(folder).get("scheduler")
    config = json.loads(carried or (Path(folder) / "scheduler" / "scheduler_config.json").read_text())
    return getattr(diffusers, config["_class_name"]).from_config(config)


def scheduler_for(saved, contract, steps):
    """The saved scheduler, or what has to take its place at this step count.

    DDIM on trailing timesteps, a teacher's or a student's, steps past them where the count does not divide its
    timesteps; and what was saved with a student is right for the count that it was trained for alone.
    """
    trailing = isinstance(saved, diffusers.DDIMScheduler) and saved.config.timestep_spacing == "trailing"
    misses = trailing and saved.config.num_train_timesteps % steps != 0
    if misses or (contract.get("target") == "next" and steps != contract.get("steps")):
        return ddim_scheduler(saved, steps)
    return saved


def list_timesteps(scheduler, steps):
    """The timesteps of so many steps: a list of ints, sometimes longer (PNDM). Raises UsageError.

    [] where every call decides on them by the size of its images, as FLUX's do.
    """
    if scheduler.config.get("use_dynamic_shifting"):
        return []
    copy = type(scheduler).from_config(scheduler.config)
    try:
        copy.set_timesteps(steps)
    except ValueError as error:
        raise UsageError(f"--steps {steps}: {type(scheduler).__name__} refuses it ({str(error)[:200]})") from None
    return [int(t) for t in copy.timesteps]
