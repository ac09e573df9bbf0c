#!/usr/bin/env bash
# tiny-sd's scores distilled into images and volumes: the losses on held-out captions; guidance scales, of which the
# large ones seek modes, beside the teacher's own samples; pixels, by either way back; volumes; and one picture of it.
# The global batch, and so the result, is the same however many processes share it.
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/common/launch.sh
out=outputs/sds
optimize() {
    launch optimize_sds.py --report_to none --checkpoints_total_limit 1 --resume_from_checkpoint latest "$@"
}
optimize --held_out_split judge --held_out_captions 20 --output_dir "$out/sds"
for loss in nfsd csd vsd; do
    optimize --held_out_split judge --held_out_captions 8 --loss "$loss" --output_dir "$out/$loss"
done
for scale in 1 4 10 30 100; do
    optimize --held_out_split judge --held_out_captions 5 --num_images 4 --max_steps 100 --guidance_scale "$scale" \
        --output_dir "$out/guidance_$scale"
    python inference.py --held_out_split judge --held_out_captions 5 --num_images 4 --steps 25 --guidance_scale "$scale" \
        --output_dir "$out/teacher_$scale"
done
for gradient in decoder encoder; do
    optimize --held_out_split judge --held_out_captions 8 --parameterization pixels --pixel_gradient "$gradient" \
        --output_dir "$out/$gradient"
done
optimize --target volume --output_dir "$out/volume" \
    --prompt "a large red circle on a white background" \
    "a small red circle above a large blue square on a gray background"
python recipes/plot_sds.py "$out"
