#!/usr/bin/env bash
# The experiments of DistFlashAttn (arXiv 2310.03294), at the size of the machine at hand; each row shows the paper's
# figure, ours here, and our prediction for the paper's own cluster.
#
#   bash scripts/reproduce_paper.sh [OUTPUT_FOLDER [ROW ...]]
#
#   1  time per iteration against Megatron          5  recomputation that keeps attention against plain
#   2  longest sequence in a fixed memory           6  overlap (reads what compare_two_hosts.sh left in the folder)
#   3  against Ring Self-Attention                  7  load balance by the number of ranks
#   4  against the unbalanced ring and Ulysses
#
# Ends with status 0 when every loss agrees.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

[ "${LIGHTSEQ_SETUP:-1}" = 0 ] || bash "$ROOT/scripts/setup_env.sh"
use_env
cd "$ROOT"
output=${1:-$ROOT/results}
[ $# = 0 ] || shift
exec python -m megatron_lightseq.tools.compare.paper.rows "$ROOT/configs/paper" "$output" "$@"
