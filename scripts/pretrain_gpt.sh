#!/usr/bin/env bash
# Pretrains a GPT with LightSeq context parallelism.
#
#   bash scripts/pretrain_gpt.sh                                     the default recipe, configs/gpt_stdlib.yaml
#   bash scripts/pretrain_gpt.sh configs/NAME.yaml [--key value ...] another recipe; flags override the file
#   bash scripts/pretrain_gpt.sh --help                              every key, with its meaning
#
# Makes the environment first and prepares the default recipe's text, each only when needed. Relative paths, in recipes
# and in flags, are relative to the repository; a recipe is also looked for from where you are.
#
# Variables: those of scripts/lib.sh, and
#   NPROC_PER_NODE   processes on this node (default: derived from the recipe and the GPUs that are there)
#   MAX_RESTARTS     how often torchrun starts all processes anew after one failed (default 0)
#   SHUTDOWN_TIMEOUT seconds that ranks get to end a step and save after Ctrl-C or SIGTERM (default: torchrun's 30)
#   NNODES, RDZV_ENDPOINT, RDZV_ID   several nodes: see scripts/slurm_pretrain.sbatch
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

DEFAULT_RECIPE=$ROOT/configs/gpt_stdlib.yaml

# Leading words that are no flags are recipes; without any, the default one. The rest is passed on as it is.
recipes=()
while [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; do
    if [ -f "$1" ]; then
        recipes+=("$(cd "$(dirname "$1")" && pwd)/$(basename "$1")")
    elif [ -f "$ROOT/$1" ]; then
        recipes+=("$ROOT/$1")
    else
        die "there is no recipe $1, here or in $ROOT" "the recipes are: $(cd "$ROOT" && echo configs/*.yaml)"
    fi
    shift
done
[ ${#recipes[@]} -gt 0 ] || recipes=("$DEFAULT_RECIPE")

bash "$ROOT/scripts/setup_env.sh"
use_env
cd "$ROOT"

for argument in "$@"; do
    case $argument in
        -h | --help | --print-config | --print_config) exec python -m megatron_lightseq pretrain "${recipes[@]}" "$@" ;;
    esac
done

# The text that the shipped recipes read; a second time this only looks whether it is up to date.
if grep -qs 'data/stdlib' "${recipes[@]}"; then
    python -m megatron_lightseq prepare-data
fi

plan=$(python "$ROOT/scripts/launch_plan.py" "${recipes[@]}" "$@") || exit
read -r processes threads device <<<"$plan"
say "starting $processes processes on ${NNODES:-1} node(s), $threads thread(s) each, on the $device"

# Without it, processes that torchrun starts anew after a failure look for each other at the dead ones' addresses, and
# most restarts fail (torch 2.13 over gloo: 13 of 15; with it: none of 10).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Cores shared out among the ranks; every rank taking all of them makes all of them slow.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$threads}"
# Kernels are started in the order they were given: with more queues, compute can get ahead of the communication that it
# is meant to overlap (Megatron asks for it with tensor parallelism, too).
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# When a collective times out, each rank writes what it was doing (torch's flight recorder), so that a hang has a
# culprit. The buffer holds a few steps: context parallelism sends many small messages, and the default 2000 is soon full.
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-20000}"

# No GPU for every rank: nobody sees one, or half the ranks would start on GPUs and wait for the rest.
if [ "$device" = cpu ]; then
    export CUDA_VISIBLE_DEVICES=''
    # torch then takes huge pages for tensors of 2 MiB and more: getting fresh small ones costs a few percent of a step.
    export THP_MEM_ALLOC_ENABLE="${THP_MEM_ALLOC_ENABLE:-1}"
fi

if [ "${NNODES:-1}" -gt 1 ]; then
    meet=(--nnodes "$NNODES" --rdzv-backend c10d
        --rdzv-endpoint "${RDZV_ENDPOINT:?several nodes need RDZV_ENDPOINT=HOST:PORT}" --rdzv-id "${RDZV_ID:-lightseq}")
else
    # A free port of its own, so that two runs on one machine do not meet by accident.
    meet=(--standalone)
    # gloo looks the host's name up to find its address, which fails or finds the wrong card on laptops; one node needs
    # the loopback interface only, and then nothing listens to the network.
    if [ -d /sys/class/net/lo ]; then export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"; fi
fi

exec python "$ROOT/scripts/launch_ranks.py" "${meet[@]}" --nproc-per-node "$processes" --max-restarts "${MAX_RESTARTS:-0}" \
    ${SHUTDOWN_TIMEOUT:+--shutdown-timeout "$SHUTDOWN_TIMEOUT"} -m megatron_lightseq pretrain "${recipes[@]}" "$@"
