#!/usr/bin/env bash
# tiny-sd's text encoder with one layer instead of three, from captions alone; then both pipelines on held-out captions.
# The global batch of 64, and so the result, is the same however many processes share it.
set -euo pipefail
cd "$(dirname "$0")/.."
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" accelerate launch --num_processes 1 --mixed_precision no \
    train_text_encoder_kd.py --num_hidden_layers 1 \
    --learning_rate 2e-3 --lr_warmup_steps 50 --lr_scheduler cosine --batch_size 64 --max_steps 4000 \
    --checkpointing_steps 500 --checkpoints_total_limit 2 --output_dir outputs/text_encoder_kd \
    --resume_from_checkpoint latest "$@"
python inference.py --pretrained_model_name_or_path outputs/text_encoder_kd/final \
    --held_out_captions "${CAPTIONS:-2000}" --steps 50 --compare_baseline --outdir outputs/text_encoder_kd/benchmark
