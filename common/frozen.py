"""The frozen part of a run: its teacher's pipeline, whose encoders are put away where a cache stands for them."""

import contextlib

import torch

from common.pipelines import keep_vae_right, load_pipeline

ENCODERS = ("vae", "text_encoder", "text_encoder_2")


def load_frozen(args, run, needs=()):
    """The pipeline of --pretrained_model_name_or_path, frozen, in the run's compute dtype, on its device.

    Without the encoders that a cache stands for, unless the method `needs` them: see `put_away`.
    """
    idle = idle_encoders(args, needs)
    without = () if draws_samples(args) else idle
    source = args.pretrained_model_name_or_path, run.dtype, args.revision, args.variant
    pipeline = load_pipeline(*source, without=without)
    keep_vae_right(pipeline)
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module) and name not in idle:
            part.to(run.device)
    return pipeline


def idle_encoders(args, needs=()):
    """Names of the encoders that a run has no use for between samples: a cache holds what they would say."""
    cached = getattr(args, "cache_dir", None) or (getattr(args, "rollout_cache", None) and not args.rollout_refresh)
    return [name for name in ENCODERS if cached and name not in needs]


def draws_samples(args):
    """Whether a run draws samples while it trains, and so needs its encoders then."""
    return bool(getattr(args, "validation_prompts", None) or getattr(args, "eval_steps", None))


def put_away(pipeline, args):
    """Take the idle encoders from the device: into the CPU's memory where samples are drawn, else out of it."""
    for name in [name for name in idle_encoders(args) if getattr(pipeline, name, None) is not None]:
        if draws_samples(args):
            getattr(pipeline, name).to("cpu")
        else:
            pipeline.register_modules(**{name: None})


@contextlib.contextmanager
def gathered(pipeline):
    """Within the context all of a pipeline's models are on its UNet's device, then each where it was."""
    device = pipeline.unet.device
    models = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    elsewhere = [(model, model.device) for model in models if model.device != device]
    try:
        for model, _ in elsewhere:
            model.to(device)
        yield
    finally:
        for model, own in elsewhere:
            model.to(own)
