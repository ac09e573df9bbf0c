#!/usr/bin/env bash
# Samples per second, memory and share of the GPU's peak of every training script at SD1.5's size, with random weights
# and each optimisation on and off: one GPU, under ten minutes, with 12 GB of disk.
#
#     ./benchmarks/gpu.sh
#     PEAK_TFLOPS=989 SCRIPTS="train_lcm.py train_flash_lora.py" BUDGET=1800 ROUNDS=3 ./benchmarks/gpu.sh
#     DRY=1 ./benchmarks/gpu.sh       # the same commands at tiny sizes on the CPU: that they run, no figures
#
# Every script has an even share of the time that is left, the first one three; its sets come in the order below, and
# what its time is not enough for is left out, compiling first: a longer BUDGET (seconds) measures it. An option that
# this checkout does not have, or that fails, is said and left out too. Tables go to the screen and to
# OUTPUT_DIR/tables.txt; beside it are a JSON file and a picture of each script. PEAK_TFLOPS: the datasheet's dense
# bf16 figure (989 for an H100 SXM, 312 for an A100, 165 for an RTX 4090); by default a large product in bf16 is
# timed, which comes to less than that. The sets in fp32 and TF32 are shares of the same bf16 peak.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
    echo "gpu.sh: $*" >&2
    exit 2
}

[ $# = 0 ] || fail "$1: it takes variables, such as BATCH_SIZE=8 ./benchmarks/gpu.sh, and no arguments."
: "${DRY:=0}" "${BUDGET:=570}" "${OUTPUT_DIR:=outputs/gpu}" "${PEAK_TFLOPS:=measure}"
: "${SCRIPTS:=train_flash_lora.py train_lcm.py train_guided.py train_progressive.py train_add.py train_student_kd.py
    train_text_encoder_kd.py}"
if [ "$DRY" = 1 ]; then
    export ACCELERATE_USE_CPU=true CUDA_VISIBLE_DEVICES=
    : "${BATCH_SIZE:=2}" "${RESOLUTION:=32}" "${STEPS:=3}" "${WARMUP:=1}" "${ROUNDS:=1}" "${PRECISION:=no}"
    model=assets/tiny-sd
else
    : "${BATCH_SIZE:=4}" "${RESOLUTION:=512}" "${STEPS:=12}" "${WARMUP:=3}" "${ROUNDS:=1}" "${PRECISION:=bf16}"
    model="$OUTPUT_DIR/sd15"
    [ "$(python -c 'import torch; print(torch.cuda.is_available())')" = True ] ||
        fail "torch finds no GPU here; DRY=1 ./benchmarks/gpu.sh tries the same commands at tiny sizes on the CPU."
fi
for script in $SCRIPTS; do
    [ -f "$script" ] || fail "SCRIPTS: there is no $script."
done
for name in BUDGET BATCH_SIZE RESOLUTION STEPS WARMUP ROUNDS; do
    [[ "${!name}" =~ ^[1-9][0-9]*$ ]] || fail "$name=${!name} is not a whole number from 1 on."
done
left() { echo $((BUDGET - SECONDS)); }

# 1 what all share: the pipeline, a smaller student, the peak, which options there are, caches
export HF_HUB_OFFLINE=1
mkdir -p "$OUTPUT_DIR"
samples=$((BATCH_SIZE * (STEPS + 2)))
data=(--dataset_name shapes --resolution "$RESOLUTION" --max_train_samples "$samples")
if [ "$DRY" != 1 ]; then
    python -c "from benchmarks.shared import sd15_folder; sd15_folder('$OUTPUT_DIR')"
fi
student="$OUTPUT_DIR/student"
if [[ "$SCRIPTS" == *train_student_kd.py* && ! -f "$student/model_index.json" ]]; then
    python prepare_unet_small.py --pretrained_model_name_or_path "$model" --student_variant sd_tiny \
        --output_dir "$student"
fi
if [ "$PEAK_TFLOPS" = measure ]; then
    PEAK_TFLOPS="$(python -c 'from benchmarks.shared import measured_peak; print(measured_peak())')"
fi
# Every script's --help, in one process: imports take longer than anything else here.
# shellcheck disable=SC2086  # words of a list
python - $SCRIPTS > "$OUTPUT_DIR/flags.txt" << 'PYTHON'
import contextlib, importlib, io, re, sys
sys.path.insert(0, ".")
for script in sys.argv[1:]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        importlib.import_module(script.removesuffix(".py")).parse_args(["--help"])
    print(script, *sorted(set(re.findall(r"--\w+", said.getvalue()))))
PYTHON
cached() { # what prepare_cache.py makes in folder $1 by the flags after it
    local folder="$1"
    shift
    python prepare_cache.py --pretrained_model_name_or_path "$model" "${data[@]}" --mixed_precision "$PRECISION" \
        --batch_size "$BATCH_SIZE" --cache_dir "$folder" --overwrite_cache "$@" ||
        echo "gpu.sh: $folder was not made; the sets that read it are left out."
}
cache="$OUTPUT_DIR/cache" x0=
cached "$cache"
for script in $SCRIPTS; do # what each asks its teacher
    case "$script" in
        train_flash_lora.py | train_add.py | train_student_kd.py)
            [ -n "$x0" ] || cached "$OUTPUT_DIR/rollouts-x0" --rollouts "$samples" --num_ddim_steps 8
            x0=made
            ln -sfn rollouts-x0 "$OUTPUT_DIR/rollouts-$script"
            ;;
        train_lcm.py)
            cached "$OUTPUT_DIR/rollouts-$script" --rollouts "$samples" --target next --num_inference_steps 50 \
                --num_ddim_steps 1
            ;;
        train_progressive.py)
            cached "$OUTPUT_DIR/rollouts-$script" --rollouts "$samples" --target next --num_inference_steps 32 \
                --num_ddim_steps 2
            ;;
    esac
done
echo "gpu.sh: prepared in $SECONDS s, peak $PEAK_TFLOPS TFLOP/s."

# 2 every script: its sets of flags, the first of which the others are compared with
has() { # whether script $1 has the flag that set $2 begins with, and what it reads
    local words
    read -ra words <<< "$2"
    grep -q -- "^$1 .*${words[0]}\\b" "$OUTPUT_DIR/flags.txt" || return 1
    case "${words[0]}" in
        --cache_dir | --rollout_cache) [ -f "${words[1]}/cache.json" ] ;;
        --torch_compile) [ "$DRY" != 1 ] ;; # minutes of a CPU
        --use_8bit_adam) [ "$DRY" != 1 ] ;; # needs a GPU
    esac
}
shares=$(($(wc -w <<< "$SCRIPTS") + 2)) own=3
: > "$OUTPUT_DIR/tables.txt"
for script in $SCRIPTS; do
    common=(--max_train_samples "$samples")
    case "$script" in
        train_flash_lora.py) ;;
        train_lcm.py | train_guided.py | train_progressive.py | train_add.py) common+=(--lora_rank 64) ;;
        train_student_kd.py) common+=(--student_model "$student") ;;
    esac
    fp32="--mixed_precision no"
    wanted=("--cache_dir $cache" "--rollout_cache $OUTPUT_DIR/rollouts-$script" "--use_8bit_adam" "--quantize_frozen int8"
        "--channels_last" "$fp32" "$fp32 --allow_tf32" "--torch_compile")
    [ "$script" != train_add.py ] || wanted[1]+=" --distill_target sample"
    sets=("")
    for flags in "${wanted[@]}"; do
        if has "$script" "$flags"; then
            sets+=("$flags")
        else
            echo "gpu.sh: $script: not measured here: $flags"
        fi
    done
    time=$(($(left) * own / shares))
    shares=$((shares - own)) own=1
    if [ "$time" -lt 1 ]; then
        echo "gpu.sh: BUDGET=$BUDGET is spent; $script is left out."
        continue
    fi
    echo "== $script, batch $BATCH_SIZE, $RESOLUTION pixels, $PRECISION, at $SECONDS s"
    ACCELERATE_MIXED_PRECISION="$PRECISION" python benchmarks/training.py --script "$script" \
        --compare "${sets[@]}" --pretrained_model_name_or_path "$model" --resolution "$RESOLUTION" \
        --batch_size "$BATCH_SIZE" --steps "$STEPS" --warmup "$WARMUP" --rounds "$ROUNDS" --keep_going \
        --peak_tflops "$PEAK_TFLOPS" --time_limit "$time" --work_dir "$OUTPUT_DIR/runs" \
        --output "$OUTPUT_DIR/${script%.py}.json" -- "${common[@]}" 2>&1 | tee -a "$OUTPUT_DIR/tables.txt" ||
        echo "gpu.sh: $script could not be measured."
done
echo "gpu.sh: done after $SECONDS s; tables, figures and pictures are in $OUTPUT_DIR."
