#!/usr/bin/env bash
# Sets up the environment with the test tools and runs the tests; arguments are passed to pytest:
#
#   bash scripts/run_tests.sh                        all tests
#   bash scripts/run_tests.sh tests/core -k zigzag   some of them
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

bash "$ROOT/scripts/setup_env.sh" --dev
use_env
cd "$ROOT"
# Multi-rank tests start several processes; with one thread each, they do not compete for cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest "$@"
