#!/usr/bin/env bash
# tiny-sd into its sd_small, and the same student without its teacher for as many steps; then teacher and both students
# on held-out captions. The global batch of 64, and so the result, is the same however many processes share it.
set -euo pipefail
cd "$(dirname "$0")/.."
processes=1 config=accelerate_configs/single_gpu.yaml
if [ "$(python -c 'import torch; print(torch.cuda.is_available())')" = False ]; then
    config=accelerate_configs/cpu.yaml
    [ "$(env -u OMP_NUM_THREADS nproc)" -lt 2 ] || processes=2
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
launch() {
    accelerate launch --config_file "$config" --num_processes "$processes" --mixed_precision no "$@"
}
train() {
    launch train_student_kd.py --learning_rate 1e-3 --lr_scheduler one_cycle --batch_size $((64 / processes)) \
        --max_steps 1000 --caption_dropout_end 0.1 --checkpointing_steps 200 --checkpoints_total_limit 2 \
        --output_dir outputs/student_kd --resume_from_checkpoint latest "$@"
}
train --run_name kd --kd_alpha_end 0.5 "$@"
train --run_name task_only --kd_weight 0 --feature_weight 0 "$@"
launch evaluate.py --models assets/tiny-sd outputs/student_kd/kd/final outputs/student_kd/task_only/final \
    --steps 25 --num_images "${CAPTIONS:-2000}" --output_dir outputs/student_kd/evaluation
