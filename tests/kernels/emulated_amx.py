"""The AMX kernels on processors without AMX: csrc/cpu compiled with emulated tile instructions.

The library is built once per content of csrc/cpu (half a minute) and called through ctypes.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor

from megatron_lightseq.kernels.tile_mask import TileMask
from tests.cuda.emulator import (
    CSRC,
    ELEMENT_TYPES,
    BackwardParams,
    ForwardParams,
    StridedTensor,
    _mask,
    _shape,
    _strided,
)

COMPILE = ("g++", "-std=c++20", "-O1", "-Wno-psabi", "-fPIC", "-shared", f"-I{CSRC}", f"-I{CSRC / 'include'}")


def missing() -> str | None:
    """Why the emulated kernels cannot run here, or None."""
    if platform.machine() != "x86_64" or "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return "the emulated AMX kernels need AVX-512"
    return None if shutil.which("g++") else "the emulated AMX kernels need g++"


@cache
def library_path() -> Path:
    """The library of this checkout. It is built unless one for the same sources exists."""
    digest = hashlib.sha256(" ".join(COMPILE).encode())
    for path in sorted([*(CSRC / "cpu").rglob("*"), *(CSRC / "include").glob("*.h")]):
        if path.suffix in (".h", ".cpp"):
            digest.update(path.name.encode() + path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"mls_emulated_amx_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{digest.hexdigest()[:20]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            unfinished = Path(scratch) / "library.so"
            source = CSRC / "cpu" / "emulation" / "library.cpp"
            command = [*COMPILE, str(source), "-o", str(unfinished)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[:2000]
            unfinished.rename(library)
    return library


NO_TENSOR = StridedTensor(None, (ctypes.c_int64 * 3)())


def _results(*tensors: Tensor) -> tuple[list[StridedTensor], list[StridedTensor]]:
    """Arguments for results as fp32 sums and as rounded values; one of the two is null."""
    given, absent = [_strided(x) for x in tensors], [NO_TENSOR] * len(tensors)
    return (absent, given) if tensors[0].dtype == torch.bfloat16 else (given, absent)


@dataclass
class EmulatedAmxKernel:
    """The AMX kernels, using tiles for every mask, as a :class:`~megatron_lightseq.kernels.registry.Kernel`."""

    name: str = "emulated-amx"
    rounds_results: bool = True

    @cached_property
    def library(self) -> ctypes.CDLL:
        return ctypes.CDLL(str(library_path()))

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        return missing()

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        mask: TileMask,
        softmax_scale: float,
        accumulate: bool,
    ) -> None:
        sums, rounded = _results(out)
        params = ForwardParams(
            _shape(q, k, v),
            ELEMENT_TYPES[q.dtype],
            *[_strided(x) for x in (q, k, v)],
            *sums,
            _strided(lse),
            _mask(mask, q.shape[0], k.shape[0]),
            softmax_scale,
            0.0,  # no softcap
            accumulate,
            *rounded,
        )
        self.library.mls_emulated_amx_forward(ctypes.byref(params))

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        delta: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        *,
        mask: TileMask,
        softmax_scale: float,
        accumulate: bool = True,
    ) -> None:
        sums, rounded = _results(dq, dk, dv)
        params = BackwardParams(
            _shape(q, k, v),
            ELEMENT_TYPES[q.dtype],
            *[_strided(x) for x in (dout, q, k, v, lse, delta)],
            *sums,
            _mask(mask, q.shape[0], k.shape[0]),
            softmax_scale,
            0.0,  # no softcap
            accumulate,
            *rounded,
        )
        self.library.mls_emulated_amx_backward(ctypes.byref(params))
