# shellcheck shell=bash
# Functions shared by the scripts in this folder; source this file, do not run it.
#
# Environment variables:
#   PYTHON           the Python to create the environment with (default: the first 3.11+ found)
#   LIGHTSEQ_VENV    path of the virtual environment (default: .venv in the repository);
#                    `none` means the Python on PATH without a virtual environment (containers)
#   LIGHTSEQ_MEGATRON_CORE   a release of megatron-core to install in place of the pinned one, such as 0.18.0 (from 0.17 on
#                    it needs Python 3.12)
#   LIGHTSEQ_SETUP   0 skips setup, for environments that are known to be ready (jobs on a cluster)

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${LIGHTSEQ_VENV:-$ROOT/.venv}

say() { printf '[lightseq] %s\n' "$*"; }

# die REASON [REMEDY]: prints what is wrong and what to do about it, and ends the script.
die() {
    printf '[lightseq] error: %s\n' "$1" >&2
    [ $# -lt 2 ] || printf '[lightseq] remedy: %s\n' "$2" >&2
    exit 1
}

# Prints the Python of the environment.
env_python() {
    if [ "$VENV" = none ]; then command -v python3; else printf '%s\n' "$VENV/bin/python"; fi
}

# Prints the first interpreter that is Python 3.11 or newer. Candidates are started, because shims of version managers
# exist even for versions that are not installed. 3.11 comes first: the versions in constraints.txt are for it.
find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3 python3.12 python3.13 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
        [ "$candidate" != "${PYTHON:-}" ] || die "PYTHON=$PYTHON is not a working Python 3.11 or newer" \
            "set PYTHON to one, or unset it to search for one"
    done
    die "no Python 3.11 or newer was found on PATH" \
        "install one (Debian and Ubuntu: apt-get install python3 python3-venv python3-dev), or set PYTHON=/path/to/python3.11"
}

# Puts the environment's programs first on PATH, like `activate`, but leaves the prompt alone.
use_env() {
    [ "$VENV" != none ] || return 0
    [ -x "$VENV/bin/python" ] || die "there is no environment at $VENV" "run: bash $ROOT/scripts/setup_env.sh"
    export VIRTUAL_ENV=$VENV PATH="$VENV/bin:$PATH"
    unset PYTHONHOME
}
