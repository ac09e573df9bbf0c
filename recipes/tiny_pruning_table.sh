#!/usr/bin/env bash
# tiny-sd's UNet pruned at ratios 0.1 to 0.7, by L1 norm, by the Taylor term and by reconstruction, as it is and after
# 100 updates of recovery, judged together: docs/prune_and_quantize.md's table. CAPTIONS=N judges on N held-out
# captions. Run again to go on where it stopped: a run that has its report is not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
models=(assets/tiny-sd)
for ratio in 0.1 0.2 0.3 0.4 0.5 0.6 0.7; do
    for importance in l1 taylor reconstruction; do
        for steps in 0 100; do
            name="$importance-$ratio-$steps"
            models+=("outputs/pruning_table/$name/final")
            [ -f "outputs/pruning_table/$name/report.json" ] && continue
            python prune_and_quantize.py --unet_prune_ratio "$ratio" --importance "$importance" \
                --finetune_steps "$steps" --num_eval_images 0 --report_to none --output_dir outputs/pruning_table \
                --run_name "$name" --resume_from_checkpoint latest "$@"
        done
    done
done
python evaluate.py --models "${models[@]}" --steps 10 --held_out_split judge --num_images "${CAPTIONS:-300}" \
    --save_images 0 --output_dir outputs/pruning_table/evaluation
python recipes/pruning_table.py outputs/pruning_table
