#!/usr/bin/env bash
# tiny-sd in 32 steps halved down to one; recipes/tiny_comparison.sh judges its stages. The result does not depend on
# how many processes share the global batch of 32.
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/common/launch.sh
launch train_progressive.py --start_steps 32 --num_inference_steps 1 \
    --steps_per_stage 250 --last_stages_steps 300 600 1600 2500 --lora_rank 64 --lora_alpha 64 \
    --lora_targets to_q to_k to_v to_out.0 ff.net.0.proj ff.net.2 conv1 conv2 \
    --learning_rate 1.5e-3 --batch_size $((32 / processes)) \
    --checkpointing_steps 200 --checkpoints_total_limit 2 --output_dir outputs/progressive \
    --resume_from_checkpoint latest "$@"
