#!/usr/bin/env bash
# From nothing to a chatting model on all GPUs of a machine. On eight H100 it is upstream's speedrun of 2026-02 (depth
# 24, FineWeb-Edu), about three hours of pretraining and 75 $; with ERA=head that of 2026-07 (ClimbMix). On one GPU
# DEPTH=12 is a matter of hours. Run it from the root of a clone; every stage is skipped if it is done and goes on if it
# was interrupted. Batches are the same on 1, 2, 4 or 8 GPUs.
#   NANOCHAT_OUT=/big/disk DEPTH=20 bash recipes/speedrun.sh
#   ERA=head bash recipes/speedrun.sh
#   DEPTH=12 bash recipes/speedrun.sh    # one GPU
#   CONFIGS=my/configs bash recipes/speedrun.sh    # own data and sizes: your copies of recipes/configs/speedrun/*.yaml
set -euo pipefail
ERA=${ERA:-seed}
declare -A FOLDERS=([seed]=speedrun [head]=speedrun_head)
FOLDER=${FOLDERS[$ERA]:?ERA is $ERA, expected seed or head}
OUT=${NANOCHAT_OUT:-out/$FOLDER}
DEPTH=${DEPTH:-24}
GPUS=${GPUS:-$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)}
[ "$GPUS" -gt 0 ] || { echo "there is no GPU here: recipes/runcpu.sh is for a CPU, or set GPUS" >&2; exit 2; }
[ $((16 % GPUS)) -eq 0 ] || { echo "there are $GPUS GPUs; expected 1, 2, 4, 8 or 16: set GPUS to use fewer" >&2; exit 2; }
ACCUMULATION=$((16 / GPUS))      # fine-tuning steps of 16 micro-batches over all GPUs
LAUNCHER=recipes/accelerate/$([ "$GPUS" -eq 1 ] && echo one_gpu || echo eight_gpus).yaml
BASE=${CONFIGS:-recipes/configs/$FOLDER}        # text and network are of an era
CONFIGS=${CONFIGS:-recipes/configs/speedrun}    # the later stages follow the network
export HF_HUB_DISABLE_TELEMETRY=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
run() {
    .venv/bin/accelerate launch --quiet --config_file "$LAUNCHER" --num_processes "$GPUS" -m "$@"
}

make install
# The pinned Transformers wants a newer `kernels` than PyPI had when it was pinned; pip finds an older pair in range.
.venv/bin/pip install --quiet --constraint constraints.txt --editable '.[gpu]' 2> /dev/null ||
    .venv/bin/pip install --quiet --editable '.[gpu]' ||
    echo "no kernels from the Hub (FlashAttention) here; training says what it takes instead" >&2
.venv/bin/nanochat plan --depth "$DEPTH" --gpus "$GPUS" --era "$ERA"
.venv/bin/nanochat prepare_data --config $CONFIGS/data.yaml --output_dir "$OUT/data"
.venv/bin/nanochat train_tokenizer --config $BASE/tokenizer.yaml --output_dir "$OUT/tokenizer"
run modeling_nanochat.recipes.pretrain --config $BASE/pretrain.yaml --depth "$DEPTH" --tokenizer "$OUT/tokenizer" \
    --output_dir "$OUT/base"
run modeling_nanochat.recipes.sft --config $CONFIGS/sft.yaml --model "$OUT/base" \
    --data "$OUT/data/sft" --output_dir "$OUT/sft" --gradient_accumulation_steps "$ACCUMULATION"
run modeling_nanochat.recipes.rl --config $CONFIGS/rl.yaml --model "$OUT/sft" \
    --data "$OUT/data/rl" --output_dir "$OUT/rl" --gradient_accumulation_steps "$ACCUMULATION"
run modeling_nanochat.recipes.evaluate --config $CONFIGS/evaluate.yaml --data "$OUT/data" --output_dir "$OUT/eval" \
    --models "$OUT/base" "$OUT/sft" "$OUT/rl"
.venv/bin/nanochat report --run "$OUT"
