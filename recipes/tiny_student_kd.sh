#!/usr/bin/env bash
# tiny-sd into its sd_small, and the same student without its teacher for as many steps; then teacher and both students
# on held-out captions. The global batch of 64, and so the result, is the same however many processes share it.
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/common/launch.sh
train() {
    launch train_student_kd.py --learning_rate 1e-3 --lr_scheduler one_cycle --batch_size $((64 / processes)) \
        --max_steps 1000 --caption_dropout_end 0.1 --checkpointing_steps 200 --checkpoints_total_limit 2 \
        --output_dir outputs/student_kd --resume_from_checkpoint latest "$@"
}
train --run_name kd --kd_alpha_end 0.5 "$@"
train --run_name task_only --kd_weight 0 --feature_weight 0 "$@"
launch evaluate.py --models assets/tiny-sd outputs/student_kd/kd/final outputs/student_kd/task_only/final \
    --steps 25 --held_out_split judge --num_images "${CAPTIONS:-1500}" --output_dir outputs/student_kd/evaluation
