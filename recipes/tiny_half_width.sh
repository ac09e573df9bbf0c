#!/usr/bin/env bash
# tiny-sd at half its widths, started from the teacher's channels and, for as many steps, from random weights; then
# teacher and both students on held-out captions. The result does not depend on how many processes share the batch.
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/common/launch.sh
for run in aligned random; do
    student=outputs/half_width/student_$run
    [ -d "$student" ] || python prepare_unet_small.py --width_ratio 0.5 --output_dir "$student" \
        $([ $run = aligned ] || echo --random_init 0)
    launch train_student_kd.py --student_model "$student" --run_name "$run" \
        --learning_rate 2e-3 --lr_scheduler one_cycle --batch_size $((64 / processes)) --max_steps 1000 \
        --caption_dropout_end 0.1 --kd_alpha_end 0.5 --checkpointing_steps 200 --checkpoints_total_limit 2 \
        --output_dir outputs/half_width --resume_from_checkpoint latest "$@"
done
launch evaluate.py --models assets/tiny-sd outputs/half_width/aligned/final outputs/half_width/random/final \
    --steps 25 --held_out_split judge --num_images "${CAPTIONS:-1500}" --output_dir outputs/half_width/evaluation
