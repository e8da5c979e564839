"""The CPU kernel's memory does not grow with the sequence, and its sources compile for processors other than x86."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
ARM_COMPILER = "aarch64-linux-gnu-g++"
MIB = 1 << 20

LONG_SEQUENCE = """
import torch
from megatron_lightseq.kernels.cpu import CpuKernel
from megatron_lightseq.kernels.tile_mask import TileMask
from megatron_lightseq.training.reporting.memory import peak_resident_bytes

def attend(tokens):
    shape = (tokens, 1, 2, 16)
    q, k, v, dout, out, dq, dk, dv = (torch.ones(shape) for _ in range(8))
    lse, delta = torch.ones(1, 2, tokens), torch.ones(1, 2, tokens)
    before = peak_resident_bytes()
    options = {"mask": TileMask(-512, 0), "softmax_scale": 0.25}
    CpuKernel().forward(q, k, v, out, lse, accumulate=False, **options)
    CpuKernel().backward(dout, q, k, v, lse, delta, dq, dk, dv, **options)
    return peak_resident_bytes() - before

torch.set_num_threads(2)
attend(64)  # threads and code are loaded
print(attend(1 << 16))
"""


def test_memory_does_not_grow_with_the_sequence() -> None:
    """65536 tokens, two heads: all scores would take 32 GiB, and even one byte per key and tile of 64 rows 128 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", LONG_SEQUENCE], capture_output=True, text=True, check=True, timeout=120
    )
    assert int(done.stdout) < 8 * MIB


@pytest.mark.skipif(shutil.which(ARM_COMPILER) is None, reason=f"no {ARM_COMPILER}")
@pytest.mark.parametrize(
    "source",
    [
        "dispatch",
        "variant_baseline",
        "variant_avx2",
        "variant_avx512",
        "variant_avx512_bf16",
        "variant_amx",
        "linear/linear_baseline",
        "linear/linear_avx2",
        "linear/linear_avx512",
    ],
)
def test_compiles_for_arm(source: str, tmp_path: Path) -> None:
    """Every source of the kernel that does not include torch's headers, without warnings."""
    path = CSRC / "cpu" / f"{source}.cpp"
    assert "torch/" not in path.read_text()
    command = [ARM_COMPILER, "-std=c++20", "-O1", "-Wall", "-Werror", "-Wno-psabi", f"-I{CSRC}"]
    command += [f"-I{CSRC / 'include'}", "-c", str(path), "-o", str(tmp_path / "object.o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
