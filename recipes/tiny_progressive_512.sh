#!/usr/bin/env bash
# The exercise of docs/progressive.md: a teacher of 1000 timesteps, 512 -> 256 -> ... -> 4 steps; then every stage beside
# the undistilled teacher at the same steps, with the plot of quality against steps.
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/common/launch.sh
launch train_progressive.py --start_steps 512 --num_inference_steps 4 --steps_per_stage 100 --last_stages_steps 200 \
    --lora_rank 32 --lora_alpha 32 --lora_targets to_q to_k to_v to_out.0 ff.net.0.proj ff.net.2 conv1 conv2 \
    --learning_rate 2e-3 --batch_size $((32 / processes)) --checkpointing_steps 100 --checkpoints_total_limit 2 \
    --output_dir outputs/progressive_512 --resume_from_checkpoint latest "$@"
launch evaluate.py --trained_steps --fuse_lora --steps 512 256 128 64 32 16 8 4 \
    --models assets/tiny-sd outputs/progressive_512/stage-{256,128,64,32,16,8,4} \
    --held_out_split judge --num_images "${CAPTIONS:-128}" --output_dir outputs/progressive_512/evaluation
