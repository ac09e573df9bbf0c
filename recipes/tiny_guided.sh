#!/usr/bin/env bash
# tiny-sd's guidance of 2 baked into its UNet: one pass a step instead of two; then teacher and student on held-out
# captions. The global batch of 32, and so the result, is the same however many processes share it.
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/common/launch.sh
launch train_guided.py --guidance fixed --guidance_scale 2 \
    --learning_rate 3e-4 --lr_scheduler one_cycle --batch_size $((32 / processes)) --max_steps 600 \
    --checkpointing_steps 200 --checkpoints_total_limit 2 \
    --output_dir outputs/guided --resume_from_checkpoint latest "$@"
launch evaluate.py --models assets/tiny-sd outputs/guided/final \
    --steps 50 --held_out_split judge --num_images "${CAPTIONS:-1500}" --output_dir outputs/guided/evaluation
