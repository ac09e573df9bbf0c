#!/usr/bin/env bash
# tiny-sd in 32 steps halved down to one; then every stage beside the undistilled teacher at the same steps, with the
# plot of quality against steps. The result does not depend on how many processes share the global batch of 64.
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
launch train_progressive.py --start_steps 32 --end_steps 1 --steps_per_stage 400 --last_stages_steps 800 \
    --learning_rate 3e-4 --batch_size $((64 / processes)) --checkpointing_steps 200 --checkpoints_total_limit 2 \
    --output_dir outputs/progressive --resume_from_checkpoint latest "$@"
launch evaluate.py --models assets/tiny-sd outputs/progressive/stage-{16,8,4,2,1} --steps 50 16 8 4 2 1 \
    --trained_steps --num_images "${CAPTIONS:-2000}" --output_dir outputs/progressive/evaluation
