#!/usr/bin/env bash
# tiny-sd into one, two and four steps by train_add.py: the teacher's own samples first; then, from there, the guided
# teacher's score and the discriminator; the same without the discriminator; all judged on held-out captions.
# The global batch of 32, and so the result, is the same however many processes share it.
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/common/launch.sh
train() {
    launch train_add.py --timestep_probs 4 1 1 1 --lr_scheduler linear --ema_decay 0.99 \
        --batch_size $((32 / processes)) --checkpointing_steps 150 --checkpoints_total_limit 2 \
        --output_dir outputs/add --resume_from_checkpoint latest "$@"
}
train --run_name start --distill_target sample --num_ddim_steps 4 --cache_rollouts 500 \
    --learning_rate 7e-4 --max_steps 1500 --discriminator_start_step 1500
polish() {
    train --student_model outputs/add/start/final --distill_target score --distill_timesteps 50 400 \
        --guidance_scale 4 --lambda_distill 30 --r1_gamma 1e-4 --discriminator_learning_rate 2e-3 \
        --learning_rate 1e-4 --max_steps 450 "$@"
}
polish --run_name full
polish --run_name lambda_only --discriminator_start_step 450
launch evaluate.py --trained_steps --steps 4 2 1 \
    --models outputs/add/full/final outputs/add/lambda_only/final outputs/add/start/final \
    --held_out_split judge --num_images "${CAPTIONS:-1500}" --output_dir outputs/add/evaluation "$@"
