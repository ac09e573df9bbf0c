#!/usr/bin/env bash
# Sets everything up and takes a pipeline through all of it: a smaller student, taught by its teacher; a smaller text
# encoder; pruning, with recovery; a few-step LoRA; FP16 and INT8; a check that LoRAs for the original still work; and
# one table and one picture of what each stage cost and bought. Under 15 minutes on two quiet cores for the embedded
# tiny-sd; FULL=1 ./run.sh takes real budgets. docs/pipeline.md has every variable:
#
#     STUDENT=sd_tiny PRUNE_RATIO=0.1 OUTPUT_DIR=output/tiny ./run.sh
#     BASE=stable-diffusion-v1-5/stable-diffusion-v1-5 DATA_DIR=/data/pairs ./run.sh
#     STAGES="check evaluate" ./run.sh
#
# Run again to go on where it stopped: a stage that is complete is left as it is, one that isn't is resumed.
set -euo pipefail
cd "$(dirname "$0")"

fail() {
    echo "run.sh: $*" >&2
    exit 2
}

# 1 the variables: what is not set has the default of its kind of run
embedded=assets/tiny-sd
stages="student kd text_encoder prune lora quant check evaluate"
: "${BASE:=$embedded}" "${DATA_DIR:=}" "${FULL:=0}" "${STAGES:=$stages}" "${TEXT_ENCODER_PRUNE_RATIO:=0.25}"
: "${LORA_RANK:=32}" "${FEW_STEPS:=2}"
if [ "$BASE" != "$embedded" ]; then
    defaults="STUDENT=sd_base STEPS=800 CLIP_DISTILL_STEPS=400 RECOVER_STEPS=400 LR=1e-5 PRUNE_RATIO=0.3
        VAE_PRUNE_RATIO=0.2 LORA_STEPS=800 ROLLOUTS=0 TEACHER_STEPS=16 LORA_LR=1e-4 BATCH_SIZE=4 CAPTIONS=200
        OUTPUT_DIR=output"
elif [ "$FULL" = 1 ]; then
    defaults="STUDENT=sd_base STEPS=2000 CLIP_DISTILL_STEPS=2000 RECOVER_STEPS=1000 LR=1e-3 PRUNE_RATIO=0.3
        VAE_PRUNE_RATIO=0.2 LORA_STEPS=1440 ROLLOUTS=440 TEACHER_STEPS=4 LORA_LR=2e-3 BATCH_SIZE=32
        CAPTIONS=1500 OUTPUT_DIR=output/full"
else
    defaults="STUDENT=sd_base STEPS=300 CLIP_DISTILL_STEPS=400 RECOVER_STEPS=150 LR=1e-3 PRUNE_RATIO=0.3
        VAE_PRUNE_RATIO=0.2 LORA_STEPS=260 ROLLOUTS=48 TEACHER_STEPS=4 LORA_LR=2e-3 BATCH_SIZE=32 CAPTIONS=200
        OUTPUT_DIR=output"
fi
for default in $defaults; do
    name="${default%%=*}"
    [ -n "${!name:-}" ] || printf -v "$name" %s "${default#*=}"
done

# 2 what can't work is said before anything is set up or loaded
[ $# = 0 ] || fail "$1: it takes variables, such as STUDENT=sd_small ./run.sh, and no arguments."
for stage in $STAGES; do
    [[ " $stages " == *" $stage "* ]] || fail "STAGES: there is no stage $stage; there are: $stages."
done
case "$STUDENT" in
    sd_base | sd_small | sd_tiny | none) ;;
    *) fail "STUDENT=$STUDENT is none of sd_base, sd_small, sd_tiny and none (all blocks stay)." ;;
esac
case "$BASE" in
    sd_base | sd_small | sd_tiny) fail "BASE=$BASE: BASE is the pipeline that is made smaller; say STUDENT=$BASE." ;;
esac
if [ ! -f "$BASE/model_index.json" ] && [[ -d "$BASE" || ! "$BASE" =~ ^[A-Za-z0-9][^/]*/[^/]+$ ]]; then
    fail "BASE=$BASE is neither the folder of a pipeline nor the name of one on the hub (owner/name)."
fi
[ -z "$DATA_DIR" ] || [ -d "$DATA_DIR" ] || [ -f "$DATA_DIR" ] || fail "DATA_DIR=$DATA_DIR: there is no such folder."
[ "$BASE" = "$embedded" ] || [ -n "$DATA_DIR" ] || fail "BASE=$BASE needs DATA_DIR: captioned images to learn from."
for name in STEPS CLIP_DISTILL_STEPS LORA_STEPS TEACHER_STEPS LORA_RANK BATCH_SIZE CAPTIONS FEW_STEPS; do
    [[ "${!name}" =~ ^[1-9][0-9]*$ ]] || fail "$name=${!name} is not a whole number from 1 on."
done
for name in RECOVER_STEPS ROLLOUTS; do
    [[ "${!name}" =~ ^[0-9]+$ ]] || fail "$name=${!name} is not a whole number."
done
for name in LR LORA_LR; do
    [[ "${!name}" =~ ^[0-9]*\.?[0-9]+([eE]-?[0-9]+)?$ ]] || fail "$name=${!name} is not a number."
done
for name in PRUNE_RATIO TEXT_ENCODER_PRUNE_RATIO VAE_PRUNE_RATIO; do
    [[ "${!name}" =~ ^(0|0?\.[0-9]+)$ ]] || fail "$name=${!name} is not in [0, 1)."
done
settled="BASE DATA_DIR STUDENT STEPS CLIP_DISTILL_STEPS RECOVER_STEPS LR PRUNE_RATIO TEXT_ENCODER_PRUNE_RATIO
    VAE_PRUNE_RATIO LORA_STEPS ROLLOUTS TEACHER_STEPS LORA_LR LORA_RANK FEW_STEPS BATCH_SIZE"
settings="$(for name in $settled; do echo "$name=${!name}"; done)"
runs="$OUTPUT_DIR/runs"
if [ -f "$runs/settings" ] && [ "$(cat "$runs/settings")" != "$settings" ]; then
    changed="$({ diff "$runs/settings" <(echo "$settings") || true; } | sed -n 's/^> //p' | tr '\n' ' ')"
    fail "$OUTPUT_DIR was begun with other settings; now ${changed% }: give another OUTPUT_DIR, or remove this one."
fi

source ./setup.sh
source recipes/common/launch.sh
mkdir -p "$runs" "$OUTPUT_DIR/fp16" "$OUTPUT_DIR/test_loras"
echo "$settings" > "$runs/settings"
data=() captions=(--held_out_split judge)
if [ -n "$DATA_DIR" ]; then
    data=(--data_dir "$DATA_DIR") captions=(--data_dir "$DATA_DIR")
fi

# 3 what the stages share
each() { echo $((($1 + processes - 1) / processes)); } # of a global batch, in one process
train() { # what every run has: where it is, and that it goes on where it stopped
    local script="$1" name="$2"
    shift 2
    launch "$script" "${data[@]+"${data[@]}"}" --checkpointing_steps 100 --checkpoints_total_limit 2 \
        --report_to none --output_dir "$runs/$name" --resume_from_checkpoint latest --overwrite_output_dir "$@"
}
wanted() { # whether STAGES has this stage and what it makes is not there yet
    [[ " $STAGES " == *" $1 "* ]] || return 1
    if [ -e "$2" ]; then
        echo "== $1: $2 is complete."
        return 1
    fi
    echo "== $1, at $((SECONDS / 60)) min $((SECONDS % 60)) s"
}
link() { # $OUTPUT_DIR/$1 is $runs/$2, where that was made
    [ -d "$runs/$2" ] || return 0
    [ -L "$OUTPUT_DIR/$1" ] || [ ! -e "$OUTPUT_DIR/$1" ] || fail "$OUTPUT_DIR/$1 is in the way: move it elsewhere."
    local up=""
    [[ "$1" != */* ]] || up=../
    ln -sfn "${up}runs/$2" "$OUTPUT_DIR/$1"
}

# 4 the stages: each goes on from the last one of those before it that was made
model="$BASE"
if [ "$STUDENT" != none ]; then
    if wanted student "$runs/student"; then
        python prepare_unet_small.py --pretrained_model_name_or_path "$BASE" --student_variant "$STUDENT" \
            --output_dir "$runs/student"
    fi
    if wanted kd "$runs/kd/final-fp16"; then
        [ -d "$runs/student" ] || fail "kd teaches the student: add student to STAGES."
        train train_student_kd.py kd --pretrained_model_name_or_path "$BASE" --student_model "$runs/student" \
            --max_steps "$STEPS" --learning_rate "$LR" --lr_scheduler one_cycle --caption_dropout_end 0.1 \
            --batch_size "$(each "$BATCH_SIZE")" --export fp16
    fi
    [ ! -d "$runs/kd/final" ] || model="$runs/kd/final"
fi
link fp16/student kd/final-fp16
link distilled kd/final

if wanted text_encoder "$runs/text_encoder/final-fp16"; then
    train train_text_encoder_kd.py text_encoder --pretrained_model_name_or_path "$model" \
        --max_steps "$CLIP_DISTILL_STEPS" --learning_rate "$LR" --lr_scheduler cosine --lr_warmup_steps 50 \
        --batch_size "$(each $((2 * BATCH_SIZE)))" --export fp16
fi
[ ! -d "$runs/text_encoder/final" ] || model="$runs/text_encoder/final"
link fp16/distilled text_encoder/final-fp16
link distilled text_encoder/final

if wanted prune "$runs/prune/report.json"; then
    train prune_and_quantize.py prune --pretrained_model_name_or_path "$model" --sensitivity \
        --unet_prune_ratio "$PRUNE_RATIO" --text_encoder_prune_ratio "$TEXT_ENCODER_PRUNE_RATIO" \
        --vae_prune_ratio "$VAE_PRUNE_RATIO" --finetune_steps "$RECOVER_STEPS" --learning_rate "$LR" \
        --batch_size "$(each "$BATCH_SIZE")" --export fp16 --num_eval_images 0
fi
[ ! -d "$runs/prune/final" ] || model="$runs/prune/final"
link fp16/pruned prune/final-fp16
link pruned prune/final

few_step_lora() {
    train train_flash_lora.py lora --pretrained_model_name_or_path "$model" \
        --num_ddim_steps "$TEACHER_STEPS" --teacher_steps proportional --num_inference_steps "$FEW_STEPS" \
        --cache_rollouts "$ROLLOUTS" --lora_rank "$LORA_RANK" --lora_alpha "$LORA_RANK" \
        --lora_targets to_q to_k to_v to_out.0 ff.net.0.proj ff.net.2 conv1 conv2 \
        --max_steps "$LORA_STEPS" --learning_rate "$LORA_LR" --lr_scheduler linear --lr_warmup_steps 40 \
        --batch_size "$(each "$BATCH_SIZE")" "$@"
}
if wanted lora "$runs/lora/lora/final"; then
    few_step_lora
fi
if wanted quant "$runs/lora/lora/final-int8"; then # nothing is left to train: it is merged and written smaller
    [ -d "$runs/lora/lora/final" ] || fail "quant merges the few-step LoRA and rounds the sum: add lora to STAGES."
    few_step_lora --export fp16 int8
fi
link fp16/few_step lora/lora/final-fp16
link quant lora/lora/final-int8

if wanted check "$OUTPUT_DIR/lora_compatibility_report.json"; then
    [ -d "$OUTPUT_DIR/quant" ] || fail "check tries LoRAs on $OUTPUT_DIR/quant: add quant to STAGES."
    if [ -z "$(ls "$OUTPUT_DIR/test_loras")" ] && [ "$BASE" = "$embedded" ] && [ -z "$DATA_DIR" ]; then
        train recipes/train_style_lora.py style_lora --max_steps 150 --lora_alpha 8 --lr_warmup_steps 20 \
            --lora_targets to_q to_k to_v to_out.0 ff.net.0.proj ff.net.2 conv1 conv2 \
            --lr_scheduler linear --ema_decay 0.98 --batch_size "$(each 32)"
        ln -sfn ../runs/style_lora/final "$OUTPUT_DIR/test_loras/inverted_colours"
    fi
    if [ -n "$(ls "$OUTPUT_DIR/test_loras")" ]; then
        python recipes/check_loras.py --model "$OUTPUT_DIR/quant" --original "$BASE" \
            --lora_dir "$OUTPUT_DIR/test_loras" --output_dir "$OUTPUT_DIR"
    else
        echo "There is no LoRA in $OUTPUT_DIR/test_loras: put some there to have them checked."
    fi
fi

if [[ " $STAGES " == *" evaluate "* ]]; then
    echo "== evaluate, at $((SECONDS / 60)) min $((SECONDS % 60)) s"
    models=()
    for made in fp16/student fp16/distilled fp16/pruned fp16/few_step quant; do
        [ ! -d "$OUTPUT_DIR/$made" ] || models+=("$OUTPUT_DIR/$made")
    done
    launch evaluate.py --models "$BASE" "${models[@]+"${models[@]}"}" "${captions[@]+"${captions[@]}"}" \
        --num_images "$CAPTIONS" --output_dir "$OUTPUT_DIR/evaluation"
    echo "The picture is $OUTPUT_DIR/evaluation/grid.png; $OUTPUT_DIR/quant is what came out."
fi
echo "run.sh took $((SECONDS / 60)) min $((SECONDS % 60)) s."
