#!/usr/bin/env bash
# A LoRA that makes tiny-sd draw in inverted colours, to test compressed models with; then tiny-sd with
# and without it on held-out captions, whose colours it gets wrong as it should.
# The global batch of 32, and so the result, is the same however many processes share it.
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/common/launch.sh
launch recipes/train_style_lora.py --recolor inverted \
    --lora_rank 8 --lora_alpha 8 --lora_targets to_q to_k to_v to_out.0 ff.net.0.proj ff.net.2 conv1 conv2 \
    --learning_rate 2e-3 --lr_warmup_steps 20 --lr_scheduler linear --ema_decay 0.98 \
    --batch_size $((32 / processes)) --max_steps 300 --checkpointing_steps 150 --checkpoints_total_limit 2 \
    --output_dir outputs/style_lora --resume_from_checkpoint latest "$@"
launch evaluate.py --models assets/tiny-sd outputs/style_lora/final \
    --steps 25 --held_out_split judge --num_images "${CAPTIONS:-200}" --output_dir outputs/style_lora/evaluation
