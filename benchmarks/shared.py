"""What several benchmarks need: SD1.5 with random weights, a device's peak, spreads, circumstances, bars."""

import multiprocessing
import os
import platform
import statistics
import sys
import time
from datetime import datetime
from pathlib import Path


def build_sd15(folder):
    """SD1.5's architecture with random weights and tiny-sd's tokenizer, its captions as long as SD1.5's."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from common.small_models import build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 77
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
    )
    text = CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        vocab_size=49408,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler = PNDMScheduler(**betas, steps_offset=1, skip_prk_steps=True)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)


def sd15_folder(work):
    """work/sd15, the pipeline of build_sd15, made there if it isn't yet: 4.3 GB."""
    folder = Path(work) / "sd15"
    if not (folder / "model_index.json").is_file():
        # In a process of its own: a child's peak starts from that of the process that it was forked from.
        builder = multiprocessing.get_context("spawn").Process(target=build_sd15, args=(folder,))
        builder.start()
        builder.join()
        if builder.exitcode:
            sys.exit(f"error: --work_dir {work}: {folder} could not be written.")
    return folder


def time_product(found):
    """Put into a queue the TFLOP/s of a large product in bf16, on the GPU or else the CPU."""
    import torch

    device, side = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 1024)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))

    def seconds(count):
        began = time.perf_counter()
        for _ in range(count):
            a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / count

    seconds(3)
    found.put(2 * side**3 / min(seconds(10) for _ in range(3)) / 1e12)


def measured_peak():
    """TFLOP/s of time_product, in a process of its own, whose memory on the GPU goes with it."""
    spawn = multiprocessing.get_context("spawn")
    found = spawn.Queue()
    process = spawn.Process(target=time_product, args=(found,))
    process.start()
    tflops = found.get(timeout=300)
    process.join()
    return tflops


def spread(values):
    """(lower quartile, median, upper quartile) of a list, of one value that value."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3


def circumstances(device):
    """What figures depend on beside the flags: when, on which machine, and all that results.circumstances says."""
    from common.judging import results

    return {"date": datetime.now().astimezone().isoformat(timespec="minutes"), "hardware": hardware()} | (
        results.circumstances(device)
    )


def hardware():
    """{"cpu": its model, "cores": those that this process may use}."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return {"cpu": model, "cores": cores}


def bars(axis, names, values, label):
    """A bar for each name on a matplotlib axis, from the top down; values: (low, middle, high) or None of each."""
    middles = [value[1] if value else 0 for value in values]
    below, above = ([value[n] - value[n - 1] if value else 0 for value in values] for n in (1, 2))
    axis.barh(range(len(names)), middles, xerr=[below, above], capsize=3)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlabel(label)
