#!/usr/bin/env bash
# tiny-sd with 30 % of its UNet's, 25 % of its text encoder's and 20 % of its VAE's prunable channels gone, in every layer
# alike and where the output suffers least, each recovered for 300 updates; the second in INT8 too; judged together.
# Run again to go on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/common/launch.sh
prune() {
    launch prune_and_quantize.py --unet_prune_ratio 0.3 --text_encoder_prune_ratio 0.25 --vae_prune_ratio 0.2 \
        --finetune_steps 300 --learning_rate 5e-4 --batch_size $((32 / processes)) --num_eval_images 0 \
        --report_to none --checkpointing_steps 100 --output_dir outputs/pruning --resume_from_checkpoint latest "$@"
}
prune --run_name uniform "$@"
prune --run_name sensitivity --sensitivity --export int8 "$@"
launch evaluate.py --models assets/tiny-sd outputs/pruning/uniform/final outputs/pruning/sensitivity/final \
    outputs/pruning/sensitivity/final-int8 --steps 25 --held_out_split judge --num_images "${CAPTIONS:-1500}" \
    --output_dir outputs/pruning/evaluation
