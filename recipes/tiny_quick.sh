#!/usr/bin/env bash
# tiny-sd into a few-step LoRA, and what that bought on 300 held-out captions: table, grids, CSV and JSON in
# outputs/quick/benchmark, in under 15 minutes on two quiet cores. FULL=1 trains three times as many updates, as
# tiny_flash_lora.sh has them, and measures on 1,500 captions, into outputs/run: README's table. CAPTIONS=N measures on
# N. Run again to go on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${FULL:-0}" = 1 ]; then
    run=outputs/run captions=1500
    bash recipes/tiny_flash_lora.sh
else
    run=outputs/quick captions=300
    bash recipes/tiny_flash_lora.sh --max_steps 480 --cache_rollouts 160 --output_dir "$run"
fi
python inference.py --lora_path "$run/lora/final" --held_out_split judge \
    --held_out_captions "${CAPTIONS:-$captions}" --steps 2 4 8 --compare_baseline --fuse_lora --output_dir "$run/benchmark"
