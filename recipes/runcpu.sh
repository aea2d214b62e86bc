#!/usr/bin/env bash
# The whole pipeline on a laptop or a small server without a GPU: the demo with a deeper network and as many hours as
# you give it. Run it from the root of a clone; every stage is skipped if it is done and goes on if it was interrupted.
#   DEPTH=6 MINUTES=120 bash recipes/runcpu.sh
set -euo pipefail
OUT=${NANOCHAT_OUT:-out/cpu}
DEPTH=${DEPTH:-6}
MINUTES=${MINUTES:-60}
DEMO=recipes/configs/demo
export HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
run() {
    .venv/bin/accelerate launch --quiet --config_file recipes/accelerate/one_cpu.yaml \
        --num_cpu_threads_per_process "$(nproc)" -m "$@"
}

make install
.venv/bin/nanochat prepare_data --config $DEMO/data.yaml --output_dir "$OUT/data"
.venv/bin/nanochat train_tokenizer --config $DEMO/tokenizer.yaml \
    --data "$OUT/data/pretrain" --output_dir "$OUT/tokenizer"
run modeling_nanochat.recipes.pretrain --config $DEMO/pretrain.yaml --depth "$DEPTH" --max_minutes "$MINUTES" \
    --data "$OUT/data/pretrain" --tokenizer "$OUT/tokenizer" --output_dir "$OUT/base"
run modeling_nanochat.recipes.sft --config $DEMO/sft.yaml --model "$OUT/base" --data "$OUT/data/sft" --output_dir "$OUT/sft"
run modeling_nanochat.recipes.rl --config $DEMO/rl.yaml --model "$OUT/sft" --data "$OUT/data/rl" --output_dir "$OUT/rl"
.venv/bin/nanochat evaluate --config $DEMO/evaluate.yaml --data "$OUT/data" --output_dir "$OUT/eval" \
    --models "$OUT/base" "$OUT/sft" "$OUT/rl"
.venv/bin/nanochat report --run "$OUT"
.venv/bin/nanochat chat --model "$OUT/rl"
