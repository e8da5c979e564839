#!/usr/bin/env bash
# Injects seeded faults into real training runs, counts what was named, what ended and what was lost, and writes the table of
# docs/checkpoints-and-faults.md (docs/results/chaos.json and chaos.md).
#
#   bash scripts/run_chaos.sh                             everything; takes about an hour on two cores
#   bash scripts/run_chaos.sh --only kills,poison         some of it; the other rows of the table stay
#   bash scripts/run_chaos.sh --only kills --cases 40 --seed 7
#   bash scripts/run_chaos.sh --help                      the suites
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

bash "$ROOT/scripts/setup_env.sh" --dev
use_env
cd "$ROOT"
exec python -W ignore -m tests.chaos.table "$@"
