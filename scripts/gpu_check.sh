#!/usr/bin/env bash
# Checks everything about the CUDA kernels that needs a GPU, in less than nine minutes:
#
#   bash scripts/gpu_check.sh [--only STAGE,STAGE] [FOLDER]
#
# Stages: build the extension; compare every primitive with the emulator's vectors, bit for bit; compare forward and
# backward with fp64; two ranks on one GPU; small tiles under compute-sanitizer; time the kernels against torch's; run
# the PTX that later GPUs compile. Each stage has a time limit, and there is one for all stages together. A stage that
# fails or times out is reported, and the others still run; the exit status is 0 only if all passed. Primitives and
# kernels are checked in separate processes, so that one that hangs or breaks its CUDA context does not affect others.
# Writes log.txt, gpu.json and gpu.md to FOLDER (default: benchmarks/results/<device>-<commit>).
#
# Needs a PyTorch built for CUDA, pytest, numpy, nvcc 12.0 or later (not newer than the driver) with a C++20 compiler and
# Python's headers, and a GPU of compute capability 8.0 or later. Without nvcc, an extension that was built elsewhere with
# MLS_CUDA=1 is used; an extension that is already built saves time. Uses the Python on PATH (PYTHON=... selects another),
# installs nothing and needs no network. Without git history, set GPU_CHECK_COMMIT to the commit that is checked.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PATH="${CUDA_HOME:-/usr/local/cuda}/bin:$PATH"

# name:seconds, in order; all stages end by TOTAL. Most need a fraction of their limits; a slow one (a build on few cores,
# kernels that hang) reduces the time for the last ones.
STAGES=(build:240 primitives:60 correctness:110 ranks:50 memcheck:60 bench:160 racecheck:45 later-gpus:60)
TOTAL=535
LEAST=5           # seconds: a stage with less time is not started
BENCH_RESERVE=40  # seconds of the benchmark's limit for what is compiling when nothing new may start

say() { printf '[gpu_check %3ds] %s\n' "$SECONDS" "$*"; }
die() {
    printf '[gpu_check] error: %s\n' "$*" >&2
    exit 1
}

only=all out=''
while [ $# -gt 0 ]; do
    case $1 in
        --only) only=${2:?--only needs the names of stages} && shift ;;
        -*) die "unknown option $1. Usage: bash scripts/gpu_check.sh [--only STAGE,STAGE] [FOLDER]" ;;
        *) out=$1 ;;
    esac
    shift
done
names=${STAGES[*]%%:*}
for name in ${only//,/ }; do
    case " all $names " in
        *" $name "*) ;;
        *) die "unknown stage $name. The stages are: $names" ;;
    esac
done

# command_of STAGE SECONDS: sets the array `command`, or empties it and sets `reason`.
command_of() {
    local limit=$2 pytest=("$PYTHON" -m pytest -q -m gpu -p no:cacheprovider) apart
    apart=("$PYTHON" -m tests.cuda.apart --seconds "$((limit - 10))") # ends before the limit and reports
    reason=''
    case $1 in
        build)
            command=(env MLS_CUDA=1 "$PYTHON" setup.py build_ext --inplace)
            command -v nvcc >/dev/null ||
                { command=() && reason='nvcc is not installed; checking the existing extension'; }
            ;;
        primitives) command=("${apart[@]}" tests/cuda/test_calibration.py) ;;
        correctness) command=("${apart[@]}" tests/cuda/test_gpu.py) ;;
        ranks) command=("${pytest[@]}" tests/cuda/test_two_ranks.py) ;;
        memcheck | racecheck)
            command=(compute-sanitizer --tool "$1" --error-exitcode 9 "$PYTHON" -m tests.cuda.sanitized)
            command -v compute-sanitizer >/dev/null || { command=() && reason='compute-sanitizer is not installed'; }
            ;;
        bench)
            command=("$PYTHON" -m megatron_lightseq.tools.bench.gpu --out "$out" --seconds "$((limit - BENCH_RESERVE))"
                --commit "$commit" --checks "${verdicts[@]}")
            ;;
        later-gpus)
            command=(env CUDA_FORCE_PTX_JIT=1 "${pytest[@]}" tests/cuda/test_gpu.py
                -k "matches_fp64 and 100x77 and bfloat16 and not deterministic")
            ;;
    esac
}

# run_stage STAGE SECONDS: runs a stage within its limit and records its verdict.
run_stage() {
    local name=$1 limit=$2 start=$SECONDS left=$((TOTAL - SECONDS)) status=0 verdict
    limit=$((limit < left ? limit : left))
    command_of "$name" "$limit"
    if [ ${#command[@]} -eq 0 ]; then
        verdict="skipped: $reason"
    elif [ "$limit" -lt "$LEAST" ]; then
        verdict="FAILED: not started, total time limit reached"
    else
        printf '\n===== %s: %s\n' "$name" "${command[*]}" >>"$out/log.txt"
        timeout -k 5 "$limit" "${command[@]}" >"$out/stage.txt" 2>&1 || status=$?
        cat "$out/stage.txt" >>"$out/log.txt"
        case $status in
            0) verdict=ok ;;
            124 | 137) verdict="FAILED: timed out after $limit s" ;;
            *) verdict="FAILED: exit status $status" ;;
        esac
        # Skipped tests do not count as passed.
        if [ "$status" -eq 0 ] && grep -qE '^[0-9]+ (skipped|deselected)' "$out/stage.txt"; then
            verdict="FAILED: nothing ran"
        fi
        [ "$verdict" = ok ] && [ "$name" != bench ] || tail -n 40 "$out/stage.txt"
        rm -f "$out/stage.txt"
    fi
    verdicts+=("$name=$verdict")
    say "$name: $verdict ($((SECONDS - start)) s)"
}

# Facts about the machine that failures may depend on, for the log.
describe_machine() {
    local tool
    "$PYTHON" -c 'import sys, torch, pytest; print(sys.version, torch.__version__, torch.version.cuda, pytest.__version__)'
    for tool in nvidia-smi 'nvcc --version' 'c++ --version' 'compute-sanitizer --version' nproc 'free -g' 'git log -1 --format=%H'; do
        printf '$ %s\n' "$tool"
        # shellcheck disable=SC2086  # a command with arguments
        $tool || true
    done
}

# Kernels do not start if nvcc has a later major version than the driver.
warn_of_old_driver() {
    local driver toolkit
    driver=$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: \([0-9]*\)\..*/\1/p') || true
    toolkit=$(nvcc --version 2>/dev/null | sed -n 's/.*release \([0-9]*\)\..*/\1/p') || true
    [ -z "$driver" ] || [ -z "$toolkit" ] || [ "$toolkit" -le "$driver" ] ||
        say "warning: nvcc is from CUDA $toolkit, the driver from CUDA $driver: if no kernel starts, set CUDA_HOME to a toolkit of CUDA $driver"
}

"$PYTHON" -c 'import numpy, pytest, setuptools' || die "$PYTHON has no module of the name above. Install it next to torch, or set PYTHON."
device=$("$PYTHON" -c 'import torch; assert torch.cuda.is_available(); print(torch.cuda.get_device_name())') ||
    die "torch of $PYTHON finds no GPU. Run this on a machine with a GPU, or set PYTHON."
device=${device// /-}
commit=${GPU_CHECK_COMMIT:-$(git describe --always --dirty --abbrev=40 2>/dev/null || echo unknown)}
out=${out:-benchmarks/results/$device-${commit:0:10}}
mkdir -p "$out" || die "cannot write to $out"
describe_machine >"$out/log.txt" 2>&1 || true
verdicts=()
say "$device, commit $commit"
warn_of_old_driver

for stage in "${STAGES[@]}"; do
    name=${stage%:*} limit=${stage#*:}
    case ",$only," in
        ,all, | *",$name,"*) run_stage "$name" "$limit" ;;
    esac
    if [ "$name" = build ]; then
        missing=$("$PYTHON" -c 'from megatron_lightseq.kernels.cuda import missing_cuda; print(missing_cuda() or "")') ||
            die "the package cannot be imported; see the error above"
        [ -z "$missing" ] || die "no CUDA kernels to check: $missing. See the output of the build in $out/log.txt"
    fi
done

printf '\n'
printf '  %s\n' "${verdicts[@]}" | tee -a "$out/log.txt"
if [ -f "$out/gpu.md" ]; then # it does not yet have the stages after the benchmark
    printf '\nAll stages:\n' >>"$out/gpu.md"
    printf -- '- %s\n' "${verdicts[@]}" >>"$out/gpu.md"
fi
case "${verdicts[*]}" in
    *FAILED*) die "some stages failed; see their output in $out/log.txt" ;;
esac
say "all stages passed or were skipped: $out"
