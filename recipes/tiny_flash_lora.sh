#!/usr/bin/env bash
# tiny-sd into a few-step LoRA: the settings behind README's table. Two CPU processes of one thread each are twice as
# fast as one process of two threads; the global batch of 32, and so the result, is the same however it is split.
set -euo pipefail
cd "$(dirname "$0")/.."
processes=1 config=accelerate_configs/single_gpu.yaml
if [ "$(python -c 'import torch; print(torch.cuda.is_available())')" = False ]; then
    config=accelerate_configs/cpu.yaml
    [ "$(env -u OMP_NUM_THREADS nproc)" -lt 2 ] || processes=2
fi
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" accelerate launch --config_file "$config" --num_processes "$processes" \
    --mixed_precision no train_flash_lora.py \
    --num_ddim_steps 4 --num_inference_steps 4 --cache_rollouts 440 --lora_rank 32 --lora_alpha 32 \
    --lora_targets to_q to_k to_v to_out.0 ff.net.0.proj ff.net.2 conv1 conv2 \
    --learning_rate 2e-3 --lr_warmup_steps 40 --lr_scheduler linear --batch_size $((32 / processes)) --max_steps 1440 \
    --checkpointing_steps 250 --checkpoints_total_limit 2 --output_dir outputs/run --resume_from_checkpoint latest "$@"
