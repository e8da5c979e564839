#!/usr/bin/env bash
# The experiments of DistFlashAttn (arXiv 2310.03294), scaled to this machine; each row shows the paper's figure, ours on
# this machine, and our prediction for the paper's cluster.
#
#   bash scripts/reproduce_paper.sh [OUTPUT_FOLDER [ROW ...]]
#
#   1  time per iteration against Megatron          5  recompute with attention kept, against full recompute
#   2  longest sequence with fixed memory           6  overlap (reads the results of compare_two_hosts.sh in the folder)
#   3  against Ring Self-Attention                  7  load balance by number of ranks
#   4  against the unbalanced ring and Ulysses
#
# Exit status 0 if all losses agree.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

[ "${LIGHTSEQ_SETUP:-1}" = 0 ] || bash "$ROOT/scripts/setup_env.sh"
use_env
cd "$ROOT"
output=${1:-$ROOT/results}
[ $# = 0 ] || shift
exec python -m megatron_lightseq.tools.compare.paper.rows "$ROOT/configs/paper" "$output" "$@"
