#!/usr/bin/env bash
# tiny-sd's text encoder with one layer instead of three, from captions alone; then both pipelines on held-out captions.
# The global batch of 64, and so the result, is the same however many processes share it.
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/common/launch.sh
launch train_text_encoder_kd.py --num_hidden_layers 1 \
    --learning_rate 2e-3 --lr_warmup_steps 50 --lr_scheduler cosine --batch_size $((64 / processes)) --max_steps 2000 \
    --checkpointing_steps 500 --checkpoints_total_limit 2 --output_dir outputs/text_encoder_kd \
    --resume_from_checkpoint latest "$@"
launch evaluate.py --models assets/tiny-sd outputs/text_encoder_kd/final \
    --steps 25 --held_out_split judge --num_images "${CAPTIONS:-1500}" --output_dir outputs/text_encoder_kd/evaluation
