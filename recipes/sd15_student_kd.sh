#!/usr/bin/env bash
# Stable Diffusion 1.5 into BK-SDM-Small, its paper's setting (arXiv:2305.15798): weights 1/1/1, AdamW at a constant
# 5e-5, batch 256, 50,000 steps, EMA. DATA=/path/to/data holds captioned images in any format of --data_dir (the paper:
# 0.22 or 2.3 million pairs of LAION-Aesthetics 6.5+). VARIANT=sd_base or sd_tiny takes the paper's other students.
# One GPU; more go with --multi_gpu --num_processes G and --gradient_accumulation_steps 64/G: the batch stays 256.
# SEED=1 trains the seeds' 65M-class student at 64x64 pixels instead: sd_tiny at widths 192, 320, 512 (65,489,988
# parameters), with alpha 1 to 0.5, caption drop-out ramped up and one-cycle learning rate, on COCO.
# Not yet run on real weights by us: no published number stands behind it.
set -euo pipefail
cd "$(dirname "$0")/.."
teacher=stable-diffusion-v1-5/stable-diffusion-v1-5
if [ "${SEED:-0}" = 1 ]; then
    student=outputs/sd15_65m
    [ -d "$student" ] || python prepare_unet_small.py --pretrained_model_name_or_path $teacher \
        --student_variant sd_tiny --block_out_channels 192 320 512 --output_dir "$student"
    accelerate launch --num_processes 1 train_student_kd.py --pretrained_model_name_or_path $teacher \
        --student_model "$student" --data_dir "${DATA:?}" --resolution 64 --random_flip --dataloader_num_workers 4 \
        --kd_alpha_start 1 --kd_alpha_end 0.5 --caption_dropout_start 0 --caption_dropout_end 0.1 \
        --learning_rate 2e-4 --lr_scheduler one_cycle --batch_size 64 --max_steps 50000 --snr_gamma 5 \
        --mixed_precision fp16 --checkpointing_steps 1000 --checkpoints_total_limit 3 \
        --output_dir checkpoints --run_name sd15_65m_kd --resume_from_checkpoint latest "$@"
else
    student=outputs/sd15_${VARIANT:=sd_small}
    [ -d "$student" ] || python prepare_unet_small.py --pretrained_model_name_or_path $teacher \
        --student_variant "$VARIANT" --output_dir "$student"
    accelerate launch --num_processes 1 train_student_kd.py --pretrained_model_name_or_path $teacher \
        --student_model "$student" --data_dir "${DATA:?}" --random_flip --dataloader_num_workers 4 \
        --task_weight 1 --kd_weight 1 --feature_weight 1 --kd_alpha_end 1 --learning_rate 5e-5 --adam_weight_decay 0.01 \
        --batch_size 4 --gradient_accumulation_steps 64 --max_steps 50000 --ema_decay 0.9999 \
        --mixed_precision fp16 --gradient_checkpointing --checkpointing_steps 1000 --checkpoints_total_limit 3 \
        --output_dir checkpoints --run_name "${VARIANT}_kd" --resume_from_checkpoint latest "$@"
fi
