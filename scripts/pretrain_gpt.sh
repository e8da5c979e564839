#!/usr/bin/env bash
# Pretrains a GPT model with LightSeq context parallelism.
#
#   bash scripts/pretrain_gpt.sh                                     the default recipe, configs/gpt_stdlib.yaml
#   bash scripts/pretrain_gpt.sh configs/NAME.yaml [--key value ...] another recipe; flags override the file
#   bash scripts/pretrain_gpt.sh --help                              all keys and their meanings
#
# First sets up the environment and prepares the text of the default recipe, if necessary. Paths in recipes and flags are
# relative to the repository; a recipe may also be given relative to the current folder.
#
# Environment variables: those of scripts/lib.sh, and
#   NPROC_PER_NODE   processes on this node (default: derived from the recipe and the number of GPUs)
#   MAX_RESTARTS     how often torchrun restarts all processes after one has failed (default: 0)
#   SHUTDOWN_TIMEOUT seconds for ranks to finish a step and save after Ctrl-C, SIGTERM, SIGHUP or SIGUSR1 (default: 120)
#   NNODES, RDZV_ENDPOINT, RDZV_ID   several nodes: see scripts/slurm_pretrain.sbatch
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

DEFAULT_RECIPE=$ROOT/configs/gpt_stdlib.yaml

# Leading words that are not flags are recipes (default: the default recipe). The rest is passed on unchanged.
recipes=()
while [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; do
    if [ -f "$1" ]; then
        recipes+=("$(cd "$(dirname "$1")" && pwd)/$(basename "$1")")
    elif [ -f "$ROOT/$1" ]; then
        recipes+=("$ROOT/$1")
    else
        die "there is no recipe $1, neither here nor in $ROOT" "the recipes are: $(cd "$ROOT" && echo configs/*.yaml)"
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

# The text of the recipes in this repository; if it is up to date, this does nothing.
if grep -qs 'data/stdlib' "${recipes[@]}"; then
    python -m megatron_lightseq prepare-data
fi

plan=$(python "$ROOT/scripts/launch_plan.py" "${recipes[@]}" "$@") || exit
read -r processes threads device <<<"$plan"
say "starting $processes process(es) per node on ${NNODES:-1} node(s), with $threads thread(s) each, on the $device"

# On several nodes: otherwise processes that torchrun restarts after a failure connect to addresses of ended ones, and
# most restarts fail (with torch 2.13 and gloo, 13 of 15; with this variable, none of 10).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# The cores are divided among the ranks; if every rank used all of them, all would be slow.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$threads}"
# Kernels start in the order in which they are launched. With more queues, computation can start before the communication
# that it should overlap with (Megatron requires this for tensor parallelism, too).
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# If a collective times out, each rank writes what it was doing (torch's flight recorder), which helps to find the cause
# of a hang. The buffer holds a few steps: context parallelism sends many small messages, so the default of 2000 is small.
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-20000}"

# If there are fewer GPUs than ranks, hide them, or some ranks would start on GPUs and wait for the others.
if [ "$device" = cpu ]; then
    export CUDA_VISIBLE_DEVICES=''
    # Makes torch use huge pages for tensors of 2 MiB and more: page faults of small ones cost a few percent of a step.
    export THP_MEM_ALLOC_ENABLE="${THP_MEM_ALLOC_ENABLE:-1}"
fi

if [ "${NNODES:-1}" -gt 1 ]; then
    rendezvous=(--nnodes "$NNODES" --rdzv-backend c10d
        --rdzv-endpoint "${RDZV_ENDPOINT:?several nodes need RDZV_ENDPOINT=HOST:PORT}" --rdzv-id "${RDZV_ID:-lightseq}")
else
    # The launcher holds the job's store, on a free port of the loopback interface.
    rendezvous=(--standalone)
    # gloo resolves the host name to find its address, which can fail or give the wrong interface, for example on laptops.
    # A single node only needs the loopback interface, and then no port is open to the network.
    if [ -d /sys/class/net/lo ]; then export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"; fi
fi

exec python "$ROOT/scripts/launch_ranks.py" "${rendezvous[@]}" --nproc-per-node "$processes" --max-restarts "${MAX_RESTARTS:-0}" \
    --shutdown-timeout "${SHUTDOWN_TIMEOUT:-120}" -m megatron_lightseq pretrain "${recipes[@]}" "$@"
