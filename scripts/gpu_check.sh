#!/usr/bin/env bash
# Checks everything about the CUDA kernels that needs a GPU, in less than nine minutes:
#
#   bash scripts/gpu_check.sh [--only STAGE,STAGE] [--module FILE] [--commit] [FOLDER]
#
# Stages: build the extension; run every kernel once, its name printed before and after (smoke); compare every primitive
# with the emulator's vectors, bit for bit; compare forward and backward with fp64; two ranks on one GPU; small tiles under
# compute-sanitizer; time the kernels against torch's, alone and as attention calls them, beside predicted rates; run the
# PTX that later GPUs compile. Each stage has a time limit, and there is one for all stages together. A stage that fails or
# times out is reported, and the others still run; the exit status is 0 only if all passed. Kernels and primitives are
# checked in separate processes, so that one that hangs or breaks its CUDA context does not affect others. racecheck is
# advisory: its findings are reported and do not count as failures. A sanitizer that cannot open the GPU is skipped.
# Writes log.txt, gpu.json and gpu.md to FOLDER (default: benchmarks/results/<device>-<commit>).
#
#   --module FILE  an extension that was built elsewhere from these sources (MLS_CUDA=1), used where building fails
#   --commit       commits FOLDER at the end, whatever the verdict, and nothing else
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
STAGES=(build:240 smoke:30 primitives:60 correctness:110 ranks:50 bench:160 memcheck:60 racecheck:45 later-gpus:60)
TOTAL=535
LEAST=5           # seconds: a stage with less time is not started
BENCH_RESERVE=40  # seconds of the benchmark's limit for what is compiling when nothing new may start

say() { printf '[gpu_check %3ds] %s\n' "$SECONDS" "$*"; }
die() {
    printf '[gpu_check] error: %s\n' "$*" >&2
    exit 1
}

only=all out='' module='' commits=''
while [ $# -gt 0 ]; do
    case $1 in
        --only) only=${2:?--only needs the names of stages} && shift ;;
        --module) module=${2:?--module needs a file} && shift ;;
        --commit) commits=yes ;;
        -*) die "unknown option $1. Usage: bash scripts/gpu_check.sh [--only STAGE,STAGE] [--module FILE] [--commit] [FOLDER]" ;;
        *) out=$1 ;;
    esac
    shift
done
[ -z "$module" ] || [ -f "$module" ] || die "--module $module: there is no such file"
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
        smoke) command=("$PYTHON" -m tests.cuda.sanitized --one-dtype) ;;
        primitives) command=("${apart[@]}" tests/cuda/test_calibration.py) ;;
        correctness) command=("${apart[@]}" tests/cuda/test_gpu.py) ;;
        ranks) command=("${pytest[@]}" tests/cuda/test_two_ranks.py) ;;
        memcheck | racecheck)
            command=(compute-sanitizer --tool "$1" --error-exitcode 9 "$PYTHON" -m tests.cuda.sanitized --one-dtype)
            reason=$(why_no_sanitizer "$1") || command=()
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

# Prints why compute-sanitizer cannot run here, and fails then. Some virtual machines do not let it open the device.
why_no_sanitizer() {
    local said status=0
    command -v compute-sanitizer >/dev/null || { echo 'compute-sanitizer is not installed' && return 1; }
    said=$(timeout -k 5 20 compute-sanitizer --tool "$1" --error-exitcode 9 \
        "$PYTHON" -c 'import torch; torch.ones(1, device="cuda").sum().item()' 2>&1) || status=$?
    printf '\n===== probe of %s, exit status %s\n%s\n' "$1" "$status" "$said" >>"$out/log.txt"
    # The program itself is known to be right, so whatever the tool reports is about the tool or the machine.
    [ "$status" -ne 0 ] || return 0
    printf 'compute-sanitizer cannot check a program of one line here: %s' \
        "$(grep -iE 'error|support|fail|denied|unable' <<<"$said" | head -n 1 | cut -c1-160 || true)"
    return 1
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
        if [ "$name" = racecheck ]; then verdict=${verdict/FAILED/advisory}; fi
        [ "$verdict" = ok ] && [ "$name" != bench ] || tail -n 40 "$out/stage.txt"
        rm -f "$out/stage.txt"
    fi
    verdicts+=("$name=$verdict")
    say "$name: $verdict ($((SECONDS - start)) s)"
}

# Facts about the machine that failures may depend on, for the log.
describe_machine() {
    local tool
    "$PYTHON" -c 'import sys, torch, pytest, setuptools, numpy; print(sys.version, *(f"{m.__name__} {m.__version__}" for m in (torch, pytest, setuptools, numpy)), torch.version.cuda)'
    "$PYTHON" -c 'import os, sysconfig; path = sysconfig.get_path("include") + "/Python.h"; print(path, "exists" if os.path.exists(path) else "is missing")'
    for tool in nvidia-smi 'nvidia-smi -q' 'nvcc --version' 'c++ --version' 'compute-sanitizer --version' 'ncu --version' nproc 'free -g' 'df -h .' 'uname -a' 'git log -1 --format=%H'; do
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

# Uses --module where nothing is built: kernels that are older than their sources are refused when they are loaded.
carry_module() {
    local missing
    [ -n "$module" ] || return 0
    missing=$("$PYTHON" -c 'from megatron_lightseq.kernels.cuda import missing_cuda; print(missing_cuda() or "")' 2>&1) || true
    [ -n "$missing" ] || return 0
    cp "$module" megatron_lightseq/_C.abi3.so
    say "no CUDA kernels were built ($missing): using $module"
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
        carry_module
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
if [ -n "$commits" ]; then
    git add --force -- "$out"
    git commit --quiet -m "Record what gpu_check.sh found on $device at ${commit:0:10}" -- "$out"
    say "committed $out"
fi
case "${verdicts[*]}" in
    *FAILED*) die "some stages failed; see their output in $out/log.txt" ;;
esac
say "all stages passed or were skipped: $out"
