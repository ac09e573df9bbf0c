#!/usr/bin/env bash
# tiny-sd into one, two and four steps by train_add.py: the teacher's samples alone and then, where the learning rate
# has come down, the discriminator too; the same without the discriminator for as many steps; both on held-out captions.
# The global batch of 32, and so the result, is the same however many processes share it.
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/common/launch.sh
train() {
    launch train_add.py --distill_target sample --num_ddim_steps 4 --cache_rollouts 880 --timestep_probs 4 1 1 1 \
        --lora_rank 64 --lora_alpha 64 --lora_targets to_q to_k to_v to_out.0 ff.net.0.proj ff.net.2 conv1 conv2 \
        --learning_rate 2e-3 --lr_scheduler linear --ema_decay 0.995 \
        --max_steps 3000 --batch_size $((32 / processes)) \
        --discriminator_timesteps 20 200 --discriminator_learning_rate 2e-3 \
        --checkpointing_steps 200 --checkpoints_total_limit 2 \
        --output_dir outputs/add --resume_from_checkpoint latest "$@"
}
train --run_name full --discriminator_start_step 2400 "$@"
train --run_name lambda_only --discriminator_start_step 3000 "$@"
launch evaluate.py --trained_steps --fuse_lora --steps 4 2 1 \
    --models outputs/add/full/final outputs/add/lambda_only/final \
    --num_images "${CAPTIONS:-2000}" --output_dir outputs/add/evaluation
