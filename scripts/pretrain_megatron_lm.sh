#!/usr/bin/env bash
# Trains a small GPT model with an unmodified checkout of NVIDIA's Megatron-LM, LightSeq attention and mock data.
#
#   MEGATRON_LM_PATH=/path/to/Megatron-LM bash scripts/pretrain_megatron_lm.sh [flags of Megatron-LM or ours]
#
# Two processes share every sequence, on two GPUs or on the CPU. Given flags come last and override those below, so
#
#   ... pretrain_megatron_lm.sh --context-parallel-size 1 --cp-method megatron      with NPROC_PER_NODE=1
#
# trains the same model in one process with Megatron's own attention; the losses agree.
#
# Environment variables: those of scripts/lib.sh, and
#   MEGATRON_LM_PATH      the checkout, core_v0.14.0 or later
#   MEGATRON_LM_PACKAGES  a folder with packages that its training script imports and that are not installed
#   NPROC_PER_NODE        processes on this node (default 2)
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

CHECKOUT=${MEGATRON_LM_PATH:-}
[ -n "$CHECKOUT" ] || die "MEGATRON_LM_PATH is not set" \
    "git clone https://github.com/NVIDIA/Megatron-LM, and set the variable to that folder"
[ -f "$CHECKOUT/pretrain_gpt.py" ] || die "there is no $CHECKOUT/pretrain_gpt.py" \
    "set MEGATRON_LM_PATH to a checkout of Megatron-LM"

bash "$ROOT/scripts/setup_env.sh"
use_env
cd "$ROOT"
export PYTHONPATH="$ROOT${MEGATRON_LM_PACKAGES:+:$MEGATRON_LM_PACKAGES}${PYTHONPATH:+:$PYTHONPATH}"

missing=$(python -c '
import importlib.util
print(*(name for name in ("six", "regex", "triton", "pydantic") if importlib.util.find_spec(name) is None))')
[ -z "$missing" ] || die "Megatron-LM's training script imports packages that are not installed: $missing" \
    "pip install -c constraints.txt --target FOLDER $missing, and set MEGATRON_LM_PACKAGES=FOLDER"

# See scripts/pretrain_gpt.sh for the reasons.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
if [ -d /sys/class/net/lo ]; then export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"; fi

model=(--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 256 --max-position-embeddings 256
    --position-embedding-type rope --hidden-dropout 0 --attention-dropout 0)
data=(--mock-data --tokenizer-type NullTokenizer --vocab-size 4200 --split "99,1,0" --num-workers 0)
schedule=(--micro-batch-size 1 --global-batch-size 4 --train-iters 10 --lr 1e-2 --min-lr 1e-3
    --lr-decay-style constant --log-interval 1 --eval-interval 1000 --eval-iters 1 --seed 1234)
# For Megatron-LM without Transformer Engine and apex; otherwise leave these out.
plain=(--transformer-impl local --no-gradient-accumulation-fusion --no-rope-fusion --no-masked-softmax-fusion
    --no-persist-layer-norm)
ours=(--context-parallel-size 2 --cp-method lightseq)

exec python "$ROOT/scripts/launch_ranks.py" --standalone --nproc-per-node "${NPROC_PER_NODE:-2}" -m megatron_lightseq \
    megatron-lm "$CHECKOUT/pretrain_gpt.py" "${model[@]}" "${data[@]}" "${schedule[@]}" "${plain[@]}" "${ours[@]}" "$@"
