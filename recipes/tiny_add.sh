#!/usr/bin/env bash
# tiny-sd into one, two and four steps by train_add.py: first the teacher's samples alone, then the discriminator too.
# The result does not depend on how many processes share the global batch of 32. Without the discriminator, to compare:
# bash recipes/tiny_add.sh --discriminator_start_step 3500 --output_dir outputs/add_without
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/common/launch.sh
launch train_add.py --distill_target sample --num_ddim_steps 4 --cache_rollouts 880 \
    --timestep_probs 2 1 1 1 --lora_rank 64 --lora_alpha 64 \
    --lora_targets to_q to_k to_v to_out.0 ff.net.0.proj ff.net.2 conv1 conv2 \
    --learning_rate 2e-3 --lr_scheduler linear --max_steps 3500 --batch_size $((32 / processes)) \
    --discriminator_start_step 1600 --mismatched_captions \
    --checkpointing_steps 200 --checkpoints_total_limit 2 --output_dir outputs/add --resume_from_checkpoint latest "$@"
