"""Sampling as saved: scheduler, timesteps and guidance that belong to weights, their LoRA, and one timed call.

What inference.py and evaluate.py share.
"""

import json
import re
import time
from pathlib import Path

import diffusers
import torch

from common.arguments import UsageError
from common.diffusion import ddim_scheduler
from common.models import TINY_SD, decode_latents, is_tiny_sd, read_distillation


def default_batch_size(resolution):
    """Images per call that fit a small GPU: tiny-sd's by the score, SD1.5's and SDXL's by the few."""
    return 64 if resolution <= 64 else 8 if resolution <= 512 else 4


def slug(text):
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "prompt"


def check_lora_path(path, flag="--lora_path"):
    """Whether the LoRA is one of ours (a folder with distillation.json); UsageError where there is no LoRA."""
    where, folder = f"{flag} {path}", Path(path)
    if folder.is_dir():
        if not any(folder.glob("*.safetensors")) or folder.name.startswith("checkpoint-"):
            finals = [str(f) for f in (folder / "final", folder.parent / "final") if f.is_dir()]
            hint = f" (did you mean {finals[0]}?)" if finals else ""
            raise UsageError(f"{where}: the folder holds no LoRA to load{hint}.")
        if not (folder / "distillation.json").is_file():
            return False
        for name in ("pytorch_lora_weights.safetensors", "scheduler/scheduler_config.json"):
            if not (folder / name).is_file():
                raise UsageError(f"{where}: {name} is missing beside distillation.json.")
        return True
    if folder.is_file():
        if folder.suffix != ".safetensors":
            raise UsageError(f"{where}: only .safetensors files are loaded.")
    elif not is_hub_id(path):
        raise UsageError(f"{where}: there is no such file or folder, and it is not a hub id (owner/name) either.")
    return False


def is_hub_id(path):
    """Whether it reads as owner/name."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)) is not None


def read_contract(path):
    """distillation.json of a pipeline or LoRA folder; an ordinary teacher's where there is none."""
    try:
        return read_distillation(path)
    except (ValueError, OSError) as error:
        raise UsageError(f"{Path(path) / 'distillation.json'} can't be read ({error}).") from None


def resolve_parent(contract, path):
    """The pipeline that a student was made from: as recorded, or the embedded tiny-sd of this checkout."""
    parent = str(contract.get("parent"))
    if not Path(parent).exists() and is_tiny_sd(parent):
        return str(TINY_SD)
    if not Path(parent).exists() and (Path(parent).is_absolute() or parent.count("/") != 1):
        raise UsageError(f"{path} was made from {parent}, which is not here: give --pretrained_model_name_or_path.")
    return parent


def guidance(contract, given, flag, outside=False):
    """(guidance_scale of the pipeline call, where it comes from) for weights with this distillation.json."""
    if outside:
        scale = 1.0 if given is None else given
        return scale, f"{scale:g}, from {flag}" if given is not None else "1, the default for an outside LoRA"
    if contract["guidance"] == "baked":
        if given is not None and given > 1:
            raise UsageError(f"{flag} {given:g}: these weights have guidance baked in and would be guided twice.")
        return 1.0, "baked into the weights, so guidance_scale 1 and one UNet pass a step"
    scale = contract.get("guidance_scale", 7.5) if given is None else given
    kind = "an input of the UNet, one pass a step" if contract["guidance"] == "embedded" else "classifier-free"
    return scale, f"{scale:g} ({kind}), " + ("as saved, or 7.5" if given is None else f"from {flag}")


def read_prompts_file(path):
    """The prompts of a text file with one a line, or of captions.json: a list that is not empty. Raises UsageError."""
    path = Path(path)
    where = f"--prompts_file {path}"
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            entries = json.loads(text)
            prompts = [entries[i]["text"] for i in range(len(entries))]  # a dict has no entry 0
        else:
            prompts = text.splitlines()
        prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{where} can't be read ({getattr(error, 'strerror', None) or 'not UTF-8'}).") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{where} is not a JSON list of {{'text': ...}}.") from None
    if not prompts:
        raise UsageError(f"{where} has no prompt in it.")
    return prompts


def load_lora(pipeline, path, scale=1.0, fuse=False, flag="--lora_path"):
    """The LoRA as an adapter (or fused), its rank and alpha said aloud: an alpha that got lost shows here."""
    try:
        pipeline.load_lora_weights(path, adapter_name="student", use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise UsageError(f"{flag} {path}: it does not load on this pipeline ({first})") from None
    config = getattr(pipeline.unet, "peft_config", {}).get("student")
    if config is None:
        raise UsageError(f"{flag} {path}: it has no weights for this pipeline's UNet.")
    print(f"LoRA: rank {config.r}, alpha {config.lora_alpha:g}, --lora_scale {scale:g}.", flush=True)
    pipeline.set_adapters(["student"], [scale])
    if fuse:
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()


def saved_scheduler(folder):
    """The scheduler that a LoRA's folder carries."""
    folder = Path(folder) / "scheduler"
    kind = getattr(diffusers, json.loads((folder / "scheduler_config.json").read_text())["_class_name"])
    return kind.from_pretrained(folder)


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
    """The timesteps of so many steps: a list of ints, sometimes longer (PNDM). Raises UsageError."""
    copy = type(scheduler).from_config(scheduler.config)
    try:
        copy.set_timesteps(steps)
    except ValueError as error:
        raise UsageError(f"--steps {steps}: {type(scheduler).__name__} refuses it ({str(error)[:200]})") from None
    return [int(t) for t in copy.timesteps]


@torch.no_grad()
def sample_timed(pipeline, device, **call):
    """(pixels, seconds without decode, seconds) of one call of the stock pipeline, synchronised with the device.

    `call`: the pipeline's arguments. Pixels are fp32 (B, 3, H, W) in about [-1, 1].
    """

    def now():
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    began = now()
    latents = pipeline(output_type="latent", **call).images
    sampled = now()
    pixels = decode_latents(pipeline.vae, latents.to(pipeline.vae.dtype))
    return pixels, sampled - began, now() - began
