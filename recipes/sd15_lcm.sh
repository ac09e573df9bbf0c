#!/usr/bin/env bash
# Stable Diffusion 1.5 into an LCM-LoRA: rank 64 on attention, feed-forward and convolutions, grid of 50, at 1e-4, after
# LCM-LoRA (arXiv:2311.05556). DATA=/path/to/data holds captioned images in any format of --data_dir. One GPU; more go
# with --multi_gpu --num_processes G and --gradient_accumulation_steps 8/G: the global batch stays 64.
# CACHE=/path encodes the images and captions there first, once.
# Not yet run on real weights by us: no published number stands behind it.
set -euo pipefail
cd "$(dirname "$0")/.."
model=(--pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --mixed_precision fp16)
data=(--data_dir "${DATA:?}" --random_flip)
if [ -n "${CACHE:-}" ]; then
    accelerate launch --num_processes 1 prepare_cache.py "${model[@]}" "${data[@]}" --center_crop --cache_dir "$CACHE"
    data+=(--cache_dir "$CACHE")
fi
accelerate launch --num_processes 1 train_lcm.py "${model[@]}" "${data[@]}" \
    --lora_rank 64 --lora_alpha 64 --lora_targets to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 \
    conv1 conv2 conv_shortcut downsamplers.0.conv upsamplers.0.conv time_emb_proj \
    --num_ddim_steps 50 --guidance_scale 7.5 --learning_rate 1e-4 --lr_warmup_steps 100 \
    --batch_size 8 --gradient_accumulation_steps 8 --max_steps 4000 --gradient_checkpointing \
    --checkpointing_steps 500 \
    --validation_prompts "a photo of a red bicycle leaning on a brick wall" "a bowl of fruit on a wooden table" \
    --output_dir checkpoints --run_name sd15_lcm_lora --resume_from_checkpoint latest "$@"
