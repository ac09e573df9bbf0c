"""The one contract of sampling, for every output of every script (DESIGN.md).

The stock pipeline's roll-out with the SAVED scheduler equals the roll-out that training assumed.
"""

import torch

from common.conditioning import encode_empty_prompt, encode_prompts, guidance_embedding, predict, predict_guided
from common.diffusion import NoiseSchedule
from common.schedulers import student_timesteps


@torch.no_grad()
def assumed_rollout(pipeline, scheduler, contract, prompts, noise, num_inference_steps, generators):
    """Latents as training imagines inference: target x0 re-noises each prediction, next takes DDIM steps."""
    schedule = NoiseSchedule(pipeline.scheduler)  # the teacher's: what training has at hand
    conditioning, z = encode_prompts(pipeline, prompts, 32), noise
    times = [*student_timesteps(scheduler, num_inference_steps), -1]
    for now, after in zip(times[:-1], times[1:]):
        now, after = torch.full((len(z),), now), torch.full((len(z),), after)
        if contract["guidance"] == "cfg":
            unconditional = encode_empty_prompt(pipeline, 32)
            output = predict_guided(pipeline.unet, z, now, conditioning, unconditional, contract["guidance_scale"])
        elif contract["guidance"] == "embedded":
            scales = torch.full((len(z),), float(contract["guidance_scale"]))
            embedding = guidance_embedding(pipeline, scales, pipeline.unet)
            output = predict(pipeline.unet, z, now, conditioning, embedding)
        else:
            output = predict(pipeline.unet, z, now, conditioning)
        if contract["target"] == "x0" and int(after[0]) >= 0:
            fresh = torch.cat([torch.randn(1, *z.shape[1:], generator=generator) for generator in generators])
            z = schedule.add_noise(schedule.to_x0(output, z, now), fresh, after)
        else:
            z = schedule.ddim_step(output, z, now, after)
    return z


@torch.no_grad()
def assert_contract(pipeline, scheduler, contract, num_inference_steps, tolerance=1e-4):
    """`pipeline` holds the student; `scheduler` is the one saved with it; `contract` its distillation.json."""
    prompts = ["a small red circle on a white background", "a large blue ring on a gray background"]
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    generators = [[torch.Generator().manual_seed(seed) for seed in (2, 3)] for _ in range(2)]
    assumed = assumed_rollout(pipeline, scheduler, contract, prompts, noise, num_inference_steps, generators[0])
    if contract.get("timesteps") and len(contract["timesteps"]) == num_inference_steps:
        assert contract["timesteps"] == student_timesteps(scheduler, num_inference_steps)
    pipeline.scheduler = type(scheduler).from_config(scheduler.config)
    stock = pipeline(
        prompts,
        num_inference_steps=num_inference_steps,
        guidance_scale=contract["guidance_scale"],
        height=32,
        width=32,
        latents=noise.clone(),
        generator=generators[1],
        output_type="latent",
    ).images
    # Relative to the latents' size: at t = 999 predictions of x0 are divided by alpha = 0.068.
    difference = (stock - assumed).abs().max() / assumed.abs().max()
    assert difference < tolerance, f"{num_inference_steps} steps: the roll-outs differ by {difference:.2e}"
