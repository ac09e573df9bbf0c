"""Sampling as saved: prompts, and one timed call. What inference.py and evaluate.py share."""

import json
import re
import time
from pathlib import Path

import torch

from common.conditioning import decode_latents
from common.errors import UsageError


def default_batch_size(resolution):
    """Images per call that fit a small GPU: tiny-sd's by the score, SD1.5's and SDXL's by the few."""
    return 64 if resolution <= 64 else 8 if resolution <= 512 else 4


def slug(text):
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "prompt"


def read_prompts_file(path, flag="--prompts_file"):
    """The prompts of a text file with one a line, or of captions.json: a list that is not empty. Raises UsageError."""
    path = Path(path)
    where = f"{flag} {path}"
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
    if latents.dim() == 3:  # FLUX packs 2 x 2 of them into one
        latents = pipeline._unpack_latents(latents, call["height"], call["width"], pipeline.vae_scale_factor)
    pixels = decode_latents(pipeline.vae, latents.to(pipeline.vae.dtype))
    return pixels, sampled - began, now() - began
