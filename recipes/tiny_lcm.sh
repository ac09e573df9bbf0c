#!/usr/bin/env bash
# tiny-sd into an LCM-LoRA of rank 32, convolutions included; recipes/tiny_comparison.sh judges it. The result does not
# depend on how many processes share the global batch of 32.
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/common/launch.sh
launch train_lcm.py --lora_rank 32 --lora_alpha 32 \
    --lora_targets to_q to_k to_v to_out.0 ff.net.0.proj ff.net.2 conv1 conv2 --num_ddim_steps 8 \
    --learning_rate 2e-3 --lr_warmup_steps 40 --lr_scheduler linear --batch_size $((32 / processes)) --max_steps 1300 \
    --checkpointing_steps 260 --checkpoints_total_limit 2 --output_dir outputs/lcm --resume_from_checkpoint latest "$@"
