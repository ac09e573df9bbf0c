"""Optimizer steps of train_flash_lora.py on a full-size SD1.5 with random weights: memory, checkpoint size.

    python benchmarks/full_size_step.py --resolution 64

Writes the pipeline (4.3 GB) into --work_dir, trains --max_steps steps in a fresh process and prints its peak resident
memory, the seconds with start-up, and the checkpoint's size as one JSON line.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def build_sd15(folder):
    """SD1.5's architecture with random weights and tiny-sd's tokenizer."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from prepare_tiny_sd import build_tokenizer

    tokenizer = build_tokenizer()
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
    )
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, vocab_size=49408,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler = PNDMScheduler(**betas, steps_offset=1, skip_prk_steps=True)
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)  # fmt: skip
    pipeline.save_pretrained(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", default="outputs/full_size")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--max_steps", type=int, default=1)
    parser.add_argument("rest", nargs="*", help="further arguments of train_flash_lora.py, after --")
    args = parser.parse_args()
    work = Path(args.work_dir)
    pipeline, run = work / "sd15", work / "run"
    if not (pipeline / "model_index.json").is_file():
        build_sd15(pipeline)
    command = [
        sys.executable, str(ROOT / "train_flash_lora.py"), "--pretrained_model_name_or_path", str(pipeline),
        "--dataset_name", "shapes", "--resolution", str(args.resolution), "--batch_size", "1", "--max_steps",
        str(args.max_steps), "--output_dir", str(run), "--overwrite_output_dir", "--report_to", "none", *args.rest,
    ]  # fmt: skip
    began = time.time()
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    checkpoint = run / "lora" / f"checkpoint-{args.max_steps}"
    print(
        json.dumps(
            {
                "command": command[1:],
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                "peak_resident_gb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9,
                "seconds_with_start": time.time() - began,
                "checkpoint_mb": sum(file.stat().st_size for file in checkpoint.rglob("*")) / 1e6,
            }
        )
    )


if __name__ == "__main__":
    main()
