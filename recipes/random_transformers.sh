#!/usr/bin/env bash
# FLUX, SD3 and PixArt with random weights, small: a third of every feed-forward gone, then FP16, INT8 and FP8; where
# the output suffers least instead (--sensitivity); and one of each sampled. Minutes on any laptop.
# docs/prune_and_quantize.md has the table.
set -euo pipefail
cd "$(dirname "$0")/.."
python recipes/random_transformers.py --output_dir outputs/random
prune() {
    python prune_and_quantize.py --pretrained_model_name_or_path "outputs/random/$1" --resolution 32 \
        --num_calibration_prompts 2 --calibration_steps 2 --eval_inference_steps 2 --num_eval_images 0 \
        --report_to none --output_dir "outputs/random/pruned-$1" --overwrite_output_dir "${@:2}"
}
for kind in flux sd3 pixart; do
    prune "$kind" --transformer_prune_ratio 0.3 --run_name uniform --precision fp16 int8 fp8
    prune "$kind" --transformer_prune_ratio 0.3 --run_name sensitivity --sensitivity
    python inference.py --pretrained_model_name_or_path "outputs/random/pruned-$kind/uniform/final-fp8" --resolution 32 \
        --prompt "a red ring" --steps 2 --output_dir "outputs/random/images-$kind"
done
