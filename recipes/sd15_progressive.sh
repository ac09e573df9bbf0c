#!/usr/bin/env bash
# Stable Diffusion 1.5 to four steps by guided distillation (the scale baked in) and progressive distillation of what it
# gives, 64 -> 32 -> ... -> 4, the last two stages twice as long (arXiv:2210.03142, arXiv:2202.00512).
# DATA=/path/to/data holds captioned images in any format of --data_dir. One GPU of 40 GB; more go with --multi_gpu
# --num_processes G and --gradient_accumulation_steps 32/G: the global batch stays 256.
# Not yet run on real weights by us: no published number stands behind it.
set -euo pipefail
cd "$(dirname "$0")/.."
common=(--data_dir "${DATA:?}" --random_flip --dataloader_num_workers 4 --batch_size 8 --gradient_accumulation_steps 32
    --mixed_precision fp16 --gradient_checkpointing --checkpointing_steps 500 --checkpoints_total_limit 2
    --validation_prompts "a photo of a red bicycle leaning on a brick wall" "a bowl of fruit on a wooden table"
    --output_dir checkpoints --resume_from_checkpoint latest)
[ -d checkpoints/sd15_guided/final ] || accelerate launch --num_processes 1 train_guided.py "${common[@]}" \
    --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --guidance fixed --guidance_scale 7.5 \
    --learning_rate 1e-5 --lr_warmup_steps 100 --max_steps 5000 --run_name sd15_guided
accelerate launch --num_processes 1 train_progressive.py "${common[@]}" \
    --pretrained_model_name_or_path checkpoints/sd15_guided/final --start_steps 64 --num_inference_steps 4 \
    --steps_per_stage 5000 --last_stages_steps 10000 --learning_rate 1e-5 --run_name sd15_progressive "$@"
