#!/usr/bin/env bash
# The exercise of docs/exercise_mnist.md, on real pictures: a teacher of 1000 steps trained from nothing on MNIST, with
# judges of its own, then 500 -> 250 -> 125 -> 64 -> 32 -> 16 -> 8 steps, every stage judged on the test pictures, and
# the plot of their Fréchet distance, on the features of the CLIP trained here, against steps.
# DATA_DIR=/path/to/mnist holds train-images-idx3-ubyte, train-labels-idx1-ubyte and the two of t10k, .gz or not, of
# MNIST or any set in its format (a labels.txt names the classes), or CIFAR-10's .bin files. PERCENT=25 makes a quarter
# of all updates, CAPTIONS=100 judges by so many images. Run again to go on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/common/launch.sh
out=${OUTPUT_DIR:-outputs/exercise_mnist}
test_files=$(ls "${DATA_DIR:?}"/t10k-images* "$DATA_DIR"/test_batch.bin 2>/dev/null || true)
eval_data=${test_files%%$'\n'*}
updates() { echo $(($1 * ${PERCENT:-100} / 100)); }
launch prepare_tiny_sd.py --data_dir "$DATA_DIR" --eval_data_dir "${eval_data:-$DATA_DIR}" --resolution 32 \
    --block_out_channels 32 64 64 --layers_per_block 1 --vae_block_out_channels 16 32 32 --latents 16384 \
    --reader_steps "$(updates 600)" --clip_steps "$(updates 600)" --vae_steps "$(updates 1600)" \
    --unet_steps "$(updates 2600)" --decoder_steps "$(updates 160)" --checkpointing_steps 50 \
    --guidance_captions 100 --report_captions 200 --output_dir "$out/models"
launch train_progressive.py --pretrained_model_name_or_path "$out/models/teacher" --data_dir "$DATA_DIR" \
    --center_crop --start_steps 1000 --stages 500 250 125 64 32 16 8 \
    --last_stages_steps "$(updates 600)" "$(updates 120)" "$(updates 120)" "$(updates 120)" "$(updates 120)" \
    "$(updates 240)" "$(updates 240)" --learning_rate 4e-4 --lr_warmup_steps "$(updates 20)" \
    --batch_size $((32 / processes)) --checkpointing_steps 100 --checkpoints_total_limit 2 \
    --output_dir "$out/progressive" --resume_from_checkpoint latest "$@"
launch evaluate.py --trained_steps --steps 1000 64 32 16 8 \
    --models "$out/models/teacher" "$out"/progressive/stage-{500,250,125,64,32,16,8} \
    --data_dir "${eval_data:-$DATA_DIR}" --clip_model "$out/models/clip" --reader "$out/models/reader" \
    --num_images "${CAPTIONS:-200}" --num_real_images 2000 --output_dir "$out/evaluation"
