#!/usr/bin/env bash
# Sets everything up, distils the embedded tiny-sd teacher into a few-step LoRA, and measures what that bought on 300
# held-out captions, in under 15 minutes on two quiet cores: table, grids, CSV and JSON in outputs/quick/benchmark.
# FULL=1 ./run.sh trains three times as many updates, as recipes/tiny_flash_lora.sh has them, and measures on 2,000
# captions, into outputs/run: README's table. CAPTIONS=N measures on N. Run again to continue where it stopped.
set -euo pipefail
cd "$(dirname "$0")"
source ./setup.sh

if [ "${FULL:-0}" = 1 ]; then
    run=outputs/run captions=2000
    bash recipes/tiny_flash_lora.sh
else
    run=outputs/quick captions=300
    bash recipes/tiny_flash_lora.sh --max_steps 480 --cache_rollouts 160 --output_dir "$run"
fi
python inference.py --lora_path "$run/lora/final" --held_out_captions "${CAPTIONS:-$captions}" --steps 2 4 8 \
    --compare_baseline --fuse_lora --output_dir "$run/benchmark"
