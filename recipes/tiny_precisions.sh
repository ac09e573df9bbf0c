#!/usr/bin/env bash
# tiny-sd as it is, nothing pruned, in FP16, INT8 and FP8: bytes, how far pixels are from the original's, and scene
# accuracy, of 200 held-out captions in 10 steps. docs/quantization.md has the table that it prints.
set -euo pipefail
cd "$(dirname "$0")/.."
python prune_and_quantize.py --unet_prune_ratio 0 --precision fp16 int8 fp8 --num_eval_images "${CAPTIONS:-200}" \
    --eval_inference_steps 10 --report_to none --output_dir outputs/precisions --overwrite_output_dir "$@"
