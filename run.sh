#!/usr/bin/env bash
# Sets everything up, distils the embedded tiny-sd teacher into a few-step LoRA, and measures what that bought:
# table, grids, CSV and JSON in outputs/run/benchmark. Run again to continue where it stopped.
set -euo pipefail
cd "$(dirname "$0")"
source ./setup.sh

bash recipes/tiny_flash_lora.sh
python inference.py --lora_path outputs/run/lora/final --held_out_captions "${CAPTIONS:-2000}" --steps 2 4 8 \
    --compare_baseline --fuse_lora --outdir outputs/run/benchmark
