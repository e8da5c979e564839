#!/usr/bin/env bash
# Makes the environment with the test tools and runs the tests; arguments go to pytest:
#
#   bash scripts/run_tests.sh                        everything
#   bash scripts/run_tests.sh tests/core -k zigzag   some
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

bash "$ROOT/scripts/setup_env.sh" --dev
use_env
cd "$ROOT"
# Multi-rank tests start several processes; one thread each keeps them from fighting over the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest "$@"
