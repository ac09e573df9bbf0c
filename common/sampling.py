"""Sampling as saved: prompts, the device, and one timed call. What inference.py, evaluate.py and app.py share."""

import re
import time
from pathlib import Path

import torch
from diffusers import FluxPipeline

from common import shapes
from common.conditioning import decode_latents
from common.errors import DataError, UsageError
from common.pipelines import TRANSFORMER_PIPELINES, read_pipeline_config
from common.texts import read_records, read_text, record_captions


def default_batch_size(resolution):
    """Images per call that fit a small GPU: tiny-sd's by the score, SD1.5's and SDXL's by the few."""
    return 64 if resolution <= 64 else 8 if resolution <= 512 else 4


def settle_device(args):
    """The defaults of --device and --dtype; UsageError where they or --cpu_offload ask for what is not here."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = args.device.partition(":")[0]
    if kind not in ("cpu", "cuda", "mps") or not (kind == "cpu" or getattr(torch, kind).is_available()):
        raise UsageError(f"--device {args.device}: torch has no such device here.")
    if args.dtype == "auto":
        args.dtype = "fp16" if kind == "cuda" else "fp32"
    if args.dtype == "fp16" and kind == "cpu":
        raise UsageError("--dtype fp16 needs a GPU: use fp32 or bf16.")
    if args.cpu_offload and kind != "cuda":
        raise UsageError("--cpu_offload needs a CUDA GPU: leave it out.")


UNET_FLAGS = ("lora_path", "scheduler", "compare_baseline", "init_image")  # of inference.py


def sampled_size(args, source):
    """The native resolution of a pipeline that inference.py samples. Raises UsageError on flags that need a UNet."""
    path = source["path"]
    pipeline_class, native, _ = read_pipeline_config(path, source["revision"], transformers=True, quantized=True)
    if pipeline_class in TRANSFORMER_PIPELINES.values():
        for name in UNET_FLAGS:
            if getattr(args, name):
                kind = pipeline_class.__name__
                raise UsageError(f"--{name} is about pipelines with a UNet, and {path} is a {kind}.")
    if pipeline_class is FluxPipeline and args.negative_prompt:
        raise UsageError("--negative_prompt has no effect on FLUX, which runs one pass a step: leave it out.")
    return native


def place(pipeline, args):
    """Put a pipeline on --device, with the flags of add_device_arguments that save memory."""
    if args.attention_slicing:
        pipeline.enable_attention_slicing()
    if args.vae_slicing:
        pipeline.vae.enable_slicing()
    if args.vae_tiling:
        pipeline.vae.enable_tiling()
    if args.cpu_offload:
        pipeline.enable_model_cpu_offload(device=args.device)
    else:
        pipeline.to(args.device)


def slug(text):
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "prompt"


def read_prompts_file(path, flag="--prompts_file", column=None):
    """The prompts of a text file with one a line, or of a .json, .jsonl or .csv of captions: a list, never empty.

    A line or record without text is the empty prompt, and is said: none moves up into its place. Raises UsageError.
    """
    path = Path(path)
    try:
        if path.suffix.lower() in (".json", ".jsonl", ".csv", ".tsv"):
            prompts = [record_captions(record, column, where)[0] for where, record in read_records(path)]
        else:
            lines = re.split(r"\r\n|\r|\n", read_text(path).rstrip())  # not splitlines, which knows other ends
            prompts = [line.strip() for line in lines]
    except OSError as error:
        raise UsageError(f"{flag} {path} can't be read ({error.strerror}).") from None
    except DataError as error:
        raise UsageError(f"{flag}: {error}") from None
    check_prompts(prompts, f"{flag} {path}")
    return prompts


def check_held_out(args):
    """UsageError where --held_out_split has no --held_out_captions to be about, or fewer captions than these."""
    if args.held_out_split != "all" and not args.held_out_captions:
        raise UsageError(f"--held_out_split {args.held_out_split} is about --held_out_captions: add it.")
    shapes.check_count("--held_out_captions", args.held_out_captions or 0, args.held_out_split)


def asked_prompts(args):
    """The prompts of --prompt, --prompts_file or --held_out_captions, a list; None where none of them is given."""
    if args.held_out_captions:
        return shapes.held_out_captions(args.held_out_captions, args.held_out_split)
    if args.prompts_file:
        return read_prompts_file(args.prompts_file)
    if args.prompt is None:
        return None
    prompts = [prompt.strip() for prompt in args.prompt]
    check_prompts(prompts, "--prompt")
    return prompts


def check_prompts(prompts, where):
    """Say which prompts are empty, of `where`, by line. Raises UsageError where none has text."""
    if not any(prompts):
        raise UsageError(f"{where} has no prompt in it.")
    empty = [number for number, prompt in enumerate(prompts, 1) if not prompt]
    if empty:
        print(f"{where}: {len(empty)} empty prompts, e.g. line {empty[0]}; the empty prompt stands there.", flush=True)


@torch.no_grad()
def sample_timed(pipeline, device, **call):
    """(pixels, seconds without decode, seconds) of one call of the stock pipeline, synchronised with the device.

    `call`: the pipeline's arguments. Pixels are fp32 (B, 3, H, W) in about [-1, 1]; UsageError where they are NaN.
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
    seconds = now() - began
    broken = int((~pixels.flatten(1).isfinite().all(1)).sum())
    if broken:
        raise UsageError(
            f"{broken} of {len(pixels)} images are not finite numbers, so they are not scored: take bf16 or fp32 "
            "instead of fp16, or another checkpoint of the model."
        )
    return pixels, sampled - began, seconds
