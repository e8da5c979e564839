#!/usr/bin/env bash
# Everything about the CUDA kernels that only a GPU can show, in one command of under nine minutes:
#
#   bash scripts/gpu_check.sh [FOLDER]        results go to FOLDER (default: benchmarks/results/<device>-<commit>)
#
# 1. builds the extension with CUDA; 2. compares every primitive with the emulator's vectors, bit for bit; 3. compares
# forward and backward with fp64, and two ranks on one GPU; 4. runs small tiles under compute-sanitizer; 5. times the
# kernels against torch's. It stops at the first thing that is wrong: numbers of wrong kernels are worth nothing.
#
# Needs a PyTorch built for CUDA, nvcc, and a GPU of compute capability 8.0 or later. It uses the Python on PATH
# (PYTHON=... chooses another) and installs nothing.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

say() { printf '[gpu_check %3ds] %s\n' "$SECONDS" "$*"; }
die() {
    printf '[gpu_check] error: %s\n' "$*" >&2
    exit 1
}

"$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' ||
    die "$PYTHON has no torch that sees a GPU. Run this on a machine with one, or set PYTHON."
device=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))')
commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
out=${1:-benchmarks/results/$device-$commit}
mkdir -p "$out"

say "building"
major=$("$PYTHON" -c 'import torch; print("90a" if torch.cuda.get_device_capability() == (9, 0) else "80")')
MLS_CUDA=1 MLS_CUDA_ARCHS=${MLS_CUDA_ARCHS:-$([ "$major" = 90a ] && echo "90a" || echo "80")} \
    "$PYTHON" setup.py build_ext --inplace >"$out/build.log" 2>&1 || {
    tail -20 "$out/build.log"
    die "the build failed; all of its output is in $out/build.log"
}

say "primitives, bit for bit"
"$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests/cuda/test_calibration.py | tee "$out/calibration.log"

say "kernels against fp64, two ranks on one GPU"
"$PYTHON" -m pytest -q -m gpu -p no:cacheprovider --timeout 240 tests/cuda/test_gpu.py | tee "$out/correctness.log"

if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        say "compute-sanitizer $tool"
        timeout 60 compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" -m tests.cuda.sanitized \
            >"$out/$tool.log" 2>&1 || {
            tail -20 "$out/$tool.log"
            die "compute-sanitizer $tool: see $out/$tool.log"
        }
    done
else
    say "compute-sanitizer is not here: SKIPPED"
fi

say "benchmarks"
timeout 240 "$PYTHON" -m megatron_lightseq.bench.gpu --out "$out"
say "done: $out"
