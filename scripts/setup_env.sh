#!/usr/bin/env bash
# Sets up the environment for the other scripts: a virtual environment, the pinned dependencies, and the package with its
# C++ extension. A phase is skipped if nothing that it depends on has changed, so running it again takes a second.
#
#   bash scripts/setup_env.sh [--dev]                     --dev adds the dependencies of tests and linters
#   LIGHTSEQ_VENV=none bash scripts/setup_env.sh [--dev]  installs into the Python on PATH and keeps its torch (containers)
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

[ "${LIGHTSEQ_SETUP:-1}" != 0 ] || exit 0

dev=''
case "${1:-}" in
    '') ;;
    --dev) dev=--dev ;;
    *) die "unknown argument: $1" "bash scripts/setup_env.sh [--dev]" ;;
esac

if [ "$VENV" = none ]; then STATE=$ROOT/build/setup; else STATE=$VENV/lightseq; fi
LOG=$STATE/setup.log

# phase NAME COMMAND...: runs a command with its output in the log; prints one line with its duration, and the end of the
# log on failure. (bash ignores `set -e` inside conditions, so functions passed as commands chain with &&.)
phase() {
    local name=$1 start=$SECONDS
    shift
    if ! { "$@"; } >>"$LOG" 2>&1; then
        tail -n 25 "$LOG" >&2
        die "$name failed after $((SECONDS - start)) s (full log: $LOG)" "${REMEDY:-see the log above}"
    fi
    say "$name: done in $((SECONDS - start)) s"
}

hash_of() { "$PY" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'; }

make_venv() {
    # --clear removes what an earlier failed attempt left.
    "$1" -m venv --clear "$VENV" && mkdir -p "$STATE"
}

ensure_venv() {
    [ "$VENV" != none ] || return 0
    "$VENV/bin/python" -c 'import pip' >/dev/null 2>&1 && return 0
    if [ -n "$(ls -A "$VENV" 2>/dev/null)" ] && [ ! -f "$VENV/pyvenv.cfg" ]; then
        die "$VENV contains files and is not a virtual environment" "set LIGHTSEQ_VENV to a new folder, or unset it"
    fi
    local base
    base=$(find_python)
    # Not in the folder of the environment, which --clear empties.
    LOG=$(mktemp) REMEDY='Debian and Ubuntu: apt-get install python3-venv' \
        phase "environment ($("$base" -V 2>&1), $VENV)" make_venv "$base"
}

install_dependencies() {
    # Everything is pinned: without a pin, torch would be the newest build with gigabytes of CUDA libraries.
    "$PY" scripts/dependencies.py requirements $dev >"$STATE/requirements.txt" &&
        "$PY" scripts/dependencies.py constraints ${KEEP_TORCH:+--keep-torch} >"$STATE/constraints.txt" &&
        "$PY" -m pip install --disable-pip-version-check -r "$STATE/requirements.txt" -c "$STATE/constraints.txt"
}

ensure_dependencies() {
    local wanted
    wanted=$("$PY" scripts/dependencies.py requirements $dev | cat - constraints.txt | hash_of)
    # An environment with --dev also serves runs without it.
    grep -qxF "$wanted" "$STATE/dependencies" 2>/dev/null && return 0
    say "dependencies: installing (torch first; takes minutes with a slow connection) ..."
    REMEDY='check the network and pip configuration (pip config list), then run this again; it resumes where it stopped' \
        phase "dependencies" install_dependencies
    "$PY" scripts/dependencies.py requirements | cat - constraints.txt | hash_of >"$STATE/dependencies"
    echo "$wanted" >>"$STATE/dependencies"
}

# Checks for the compiler that torch's extension builder will call.
check_compiler() {
    local cxx=${CXX:-c++}
    command -v "${cxx%% *}" >/dev/null || die "no C++ compiler ($cxx) was found on PATH" \
        "install one (Debian and Ubuntu: apt-get install g++; macOS: xcode-select --install), or set CXX=/path/to/compiler"
    local headers
    headers=$("$PY" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    [ -f "$headers/Python.h" ] || die "the headers of this Python are missing ($headers/Python.h)" \
        "Debian and Ubuntu: apt-get install python3-dev"
}

# Without isolation, because the extension must be compiled against the torch that will load it. With a CPU build of torch,
# CUDA kernels cannot run, so they are not compiled, which would take nvcc minutes.
build_extension() {
    if [ -z "${MLS_CUDA:-}" ] && "$PY" -c 'import importlib.metadata as m, sys; sys.exit("+cpu" not in m.version("torch"))'; then
        export MLS_CUDA=0
    fi
    "$PY" -m pip install --disable-pip-version-check --no-build-isolation --no-deps --editable .
}

sources() {
    find csrc setup.py pyproject.toml megatron_lightseq/__init__.py -type f | LC_ALL=C sort | xargs cat
    "$PY" -c 'import importlib.metadata as m, sys; print(sys.version, m.version("torch"))'
    printf '%s %s %s\n' "$ROOT" "${CXX:-}" "$(env | grep '^MLS_' | LC_ALL=C sort || true)"
}

ensure_extension() {
    local wanted
    wanted=$(sources | hash_of)
    if [ "$wanted" = "$(cat "$STATE/extension" 2>/dev/null)" ] && "$PY" -c 'import megatron_lightseq' 2>/dev/null; then
        return 0
    fi
    check_compiler
    say "extension: compiling csrc/ ..."
    REMEDY='the first error in the log names the file; if the compiler is too old (C++20 is needed), set CXX' \
        phase "extension" build_extension
    echo "$wanted" >"$STATE/extension"
}

cd "$ROOT"
# Two simultaneous runs (two terminals, two jobs on one file system) wait for each other, if there is flock and the file
# system supports locks.
exec 9<"$ROOT/scripts/setup_env.sh"
flock 9 2>/dev/null || true
ensure_venv
mkdir -p "$STATE"
: >"$LOG"
PY=$(env_python) || die "no python3 is on PATH" "LIGHTSEQ_VENV=none uses the Python on PATH; unset it to use a virtual environment"
KEEP_TORCH=''
if [ "$VENV" = none ] && "$PY" -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null; then KEEP_TORCH=yes; fi
ensure_dependencies
ensure_extension
