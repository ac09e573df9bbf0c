#!/usr/bin/env bash
# Stable Diffusion 1.5 to 1, 2 and 4 steps by adversarial distillation (arXiv:2311.17042; in latents 2403.12015).
# DATA=/path/to/data holds captioned images in any format of --data_dir. One GPU; more go with --multi_gpu
# --num_processes G and --gradient_accumulation_steps 16/G: the global batch stays 128.
# Not yet run on real weights by us: no published number stands behind it.
set -euo pipefail
cd "$(dirname "$0")/.."
accelerate launch --num_processes 1 train_add.py --data_dir "${DATA:?}" --random_flip --dataloader_num_workers 4 \
    --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --guidance_scale 7.5 \
    --discriminator unet --mismatched_captions --lambda_distill 2.5 --timestep_probs 2 1 1 1 \
    --batch_size 8 --gradient_accumulation_steps 16 --mixed_precision bf16 --gradient_checkpointing \
    --learning_rate 1e-5 --discriminator_learning_rate 1e-4 --lr_warmup_steps 200 --max_steps 10000 \
    --discriminator_start_step 1000 --checkpointing_steps 500 --checkpoints_total_limit 2 \
    --validation_prompts "a photo of a red bicycle leaning on a brick wall" "a bowl of fruit on a wooden table" \
    --output_dir checkpoints --run_name sd15_add --resume_from_checkpoint latest "$@"
