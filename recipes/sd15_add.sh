#!/usr/bin/env bash
# Stable Diffusion 1.5 to 1, 2 and 4 steps by adversarial distillation (arXiv:2311.17042; in latents 2403.12015), in the
# two runs of recipes/tiny_add.sh: the teacher's samples first, then its score and the discriminator.
# DATA=/path/to/data holds captioned images in any format of --data_dir. One GPU; more go with --multi_gpu
# --num_processes G and --gradient_accumulation_steps 16/G: the global batch stays 128.
# Not yet run on real weights by us: no published number stands behind it.
set -euo pipefail
cd "$(dirname "$0")/.."
train() {
    accelerate launch --num_processes 1 train_add.py --data_dir "${DATA:?}" --random_flip --dataloader_num_workers 4 \
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --timestep_probs 4 1 1 1 \
        --batch_size 8 --gradient_accumulation_steps 16 --mixed_precision fp16 --gradient_checkpointing \
        --learning_rate 1e-5 --lr_warmup_steps 200 --checkpointing_steps 500 --checkpoints_total_limit 2 \
        --validation_prompts "a photo of a red bicycle leaning on a brick wall" "a bowl of fruit on a wooden table" \
        --output_dir checkpoints --resume_from_checkpoint latest "$@"
}
train --run_name sd15_add_start --distill_target sample --num_ddim_steps 16 --teacher_steps proportional \
    --guidance_scale 7.5 \
    --max_steps 6000 --discriminator_start_step 6000 "$@"
train --run_name sd15_add --student_model checkpoints/sd15_add_start/final \
    --distill_target score --distill_timesteps 50 400 --guidance_scale 10 --lambda_distill 30 --r1_gamma 1e-4 \
    --discriminator_learning_rate 1e-4 --max_steps 4000 "$@"
