#!/usr/bin/env bash
# Trains the same model on the same text with several systems, including Megatron's own, and compares them:
#
#   bash scripts/compare_baselines.sh                      all systems that can run here, with two processes
#   bash scripts/compare_baselines.sh FLAGS                the same with flags of `lightseq compare` (see its --help)
#   bash scripts/compare_baselines.sh --docs               all measurements in docs/performance.md, and the document
#
# Exit status 0 if all losses agree. Do not use the machine otherwise: times are wall clock times.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

[ "${LIGHTSEQ_SETUP:-1}" = 0 ] || bash "$ROOT/scripts/setup_env.sh"
use_env
cd "$ROOT"
export LIGHTSEQ_SETUP=0 # done, for the scripts that are called from here

if [ "${1:-}" != --docs ]; then
    exec python -m megatron_lightseq compare --output "$ROOT/results" "$@"
fi
shift

results=$ROOT/docs/results
failed='' skipped=0
# part NAME COMMAND...: runs one part of the document and prints how long it took; failures do not stop the script.
part() {
    local name=$1 start=$SECONDS status=0
    shift
    "$@" || status=$?
    case $status in
        0) say "$name: done in $((SECONDS - start)) s" ;;
        77) skipped=$((skipped + 1)) ;;
        *)
            failed="$failed $name"
            say "$name: FAILED after $((SECONDS - start)) s"
            ;;
    esac
}
# Two heads and 16384 tokens: few heads for tensor parallelism, and attention dominates.
long=(--num-attention-heads=2 --hidden-size=128 --seq-length=16384 --steps=2)
systems=(--systems "megatron-tp-sp,megatron-tp,lightseq")

part all-systems python -m megatron_lightseq compare --output "$results" --name all-systems "$@"
part long-fp32 python -m megatron_lightseq compare --output "$results" --name long-fp32 --rounds 3 "${long[@]}" "${systems[@]}" "$@"
part long-bf16 python -m megatron_lightseq compare --output "$results" --name long-bf16 --bf16 --rounds 3 "${long[@]}" "${systems[@]}" "$@"
part overlap python -m megatron_lightseq bench overlap --out "$results" --name overlap-loopback
part two-hosts bash scripts/compare_two_hosts.sh "$results" "${long[@]}" "$@"
part predictions python -m megatron_lightseq compare --paper --output "$results"
part paper bash scripts/reproduce_paper.sh "$results"
part summary python -m megatron_lightseq.tools.compare.summary "$results"
part document python scripts/write_docs.py

say "all parts done in $SECONDS s, $skipped skipped"
[ -z "$failed" ] || die "these parts failed:$failed" "their tables above show what differs"
