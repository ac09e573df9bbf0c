#!/usr/bin/env bash
# Three ways to few steps on one teacher, with the same data and compute: recipes/tiny_flash_lora.sh, tiny_lcm.sh and a
# short progressive distillation, 250,000 UNet passes each, where one latent through the UNet is a pass and its backward
# two more. Judged together, beside the undistilled teacher at the same step counts and tiny_progressive.sh, which takes
# 3.4 times the compute. Run again to go on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
bash recipes/tiny_flash_lora.sh
bash recipes/tiny_lcm.sh
bash recipes/tiny_progressive.sh
source recipes/common/launch.sh
launch train_progressive.py --start_steps 32 --num_inference_steps 1 --steps_per_stage 220 --last_stages_steps 410 \
    --learning_rate 2e-4 --batch_size $((32 / processes)) --checkpointing_steps 110 --checkpoints_total_limit 2 \
    --output_dir outputs/progressive_short --resume_from_checkpoint latest
launch evaluate.py --trained_steps --steps 8 4 2 1 --reference_steps 50 --fuse_lora \
    --models assets/tiny-sd outputs/run/lora/final outputs/lcm/final outputs/progressive/stage-{8,4,2,1} \
    outputs/progressive_short/stage-{8,4,2,1} \
    --held_out_split judge --num_images "${CAPTIONS:-1500}" --output_dir outputs/comparison "$@"
