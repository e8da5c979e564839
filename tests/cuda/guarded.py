"""Runs tiles whose tensors all end at an inaccessible page. Started by a test in a separate process."""

from __future__ import annotations

import ctypes
import mmap
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.cuda.emulator import Emulator
from tests.kernels.oracle import Case, delta, inputs

PAGE = mmap.PAGESIZE
NUMPY_TYPES = {torch.float32: np.float32, torch.bfloat16: np.int16, torch.int32: np.int32}


def at_page_end(x: Tensor) -> Tensor:
    """A copy of x whose last byte is the last before a page without access rights."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = x.numel() * x.element_size()
    whole = -(-size // PAGE) * PAGE
    start = libc.mmap(
        None, whole + PAGE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANON, -1, 0
    )
    assert libc.mprotect(start + whole, PAGE, 0) == 0
    memory = (ctypes.c_char * size).from_address(start + whole - size)
    flat = torch.from_numpy(np.frombuffer(memory, dtype=NUMPY_TYPES[x.dtype]))
    guarded = flat.view(x.dtype).view(x.shape)
    return guarded.copy_(x)


def run(case: Case, kernel: Emulator) -> None:
    q, k, v, dout = (at_page_end(x) for x in inputs(case, torch.bfloat16))
    out = at_page_end(torch.zeros(case.queries, case.batch, case.heads, case.value_dim))
    lse = at_page_end(torch.zeros(case.batch, case.heads, case.queries))
    mask = case.mask()
    if mask.key_ranges is not None:
        mask = replace(mask, key_ranges=at_page_end(mask.key_ranges))
    kernel.forward(q, k, v, out, lse, mask=mask, softmax_scale=case.softmax_scale, accumulate=False)
    kernel.forward(q, k, v, out, lse, mask=mask, softmax_scale=case.softmax_scale, accumulate=True)
    dq, dk, dv = (at_page_end(torch.zeros(x.shape)) for x in (q, k, v))
    grads = (at_page_end(delta(out, dout)), dq, dk, dv)
    for deterministic in (False, True):
        variant = replace(kernel, deterministic=deterministic)
        variant.backward(dout, q, k, v, lse, *grads, mask=mask, softmax_scale=case.softmax_scale)


def main() -> None:
    kernel = Emulator(Path(sys.argv[1]))
    cases = [
        Case(queries=100, keys=77, head_dim=64, value_dim=64),
        Case(queries=33, keys=129, head_dim=80, value_dim=80, ranges="documents"),
        Case(queries=65, keys=65, head_dim=128, value_dim=128, band_hi=0),
        Case(queries=17, keys=33, head_dim=192, value_dim=128, ranges="random"),
        Case(queries=33, keys=17, head_dim=256, value_dim=256),
    ]
    for case in cases:
        run(case, kernel)
    print(f"{len(cases)} tiles")


if __name__ == "__main__":
    main()
