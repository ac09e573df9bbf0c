#!/usr/bin/env bash
# Stable Diffusion 1.5 on COCO 2017 (118,000 images with captions), the seed's setting: rank 4, alpha 32, N = 4; and K of
# 16 teacher steps from the last timestep, fewer from the others (docs/flash_lora.md says why).
# COCO=/path/to/coco must hold train2017/ and annotations/captions_train2017.json. One GPU of 20 GB is enough; more
# GPUs go with --multi_gpu --num_processes G and --gradient_accumulation_steps 8/G: the global batch stays 64.
# CACHE=/path encodes the images and captions there first, once (about 90 GB).
# Not yet run on real weights by us: no published number stands behind it.
set -euo pipefail
cd "$(dirname "$0")/.."
model=(--pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --mixed_precision fp16)
data=(--data_dir "${COCO:?}" --random_flip)
if [ -n "${CACHE:-}" ]; then
    accelerate launch --num_processes 1 prepare_cache.py "${model[@]}" "${data[@]}" --center_crop --cache_dir "$CACHE"
    data+=(--cache_dir "$CACHE")
fi
accelerate launch --num_processes 1 train_flash_lora.py "${model[@]}" "${data[@]}" \
    --num_ddim_steps 16 --teacher_steps proportional --num_inference_steps 4 --guidance_scale 7.5 --lora_rank 4 --lora_alpha 32 \
    --learning_rate 1e-4 --lr_warmup_steps 100 --batch_size 8 --gradient_accumulation_steps 8 --max_steps 3000 \
    --gradient_checkpointing \
    --validation_prompts "a photo of a red bicycle leaning on a brick wall" "a bowl of fruit on a wooden table" \
    --checkpointing_steps 500 --output_dir checkpoints --run_name coco_lora_flash --resume_from_checkpoint latest "$@"
