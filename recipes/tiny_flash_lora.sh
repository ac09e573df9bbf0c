#!/usr/bin/env bash
# tiny-sd into a few-step LoRA: the settings behind README's table. The result does not depend on how many processes
# share the global batch of 32.
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/common/launch.sh
launch train_flash_lora.py \
    --num_ddim_steps 4 --num_inference_steps 4 --cache_rollouts 440 --lora_rank 32 --lora_alpha 32 \
    --lora_targets to_q to_k to_v to_out.0 ff.net.0.proj ff.net.2 conv1 conv2 \
    --learning_rate 2e-3 --lr_warmup_steps 40 --lr_scheduler linear --batch_size $((32 / processes)) --max_steps 1440 \
    --checkpointing_steps 250 --checkpoints_total_limit 2 --output_dir outputs/run --resume_from_checkpoint latest "$@"
