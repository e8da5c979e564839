"""The error budget of tests/kernels/oracle.py for a forward or a backward pass alone."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lightseq.kernels.registry import Kernel
from tests.kernels.oracle import Case, Results, expect_close, expect_within_budget, textbook


def run_forward(case: Case, tensors: tuple[Tensor, ...], kernel: Kernel) -> tuple[Tensor, Tensor]:
    """``out`` (Q, B, H, V) and ``lse`` (B, H, Q) of one call; both start as NaN."""
    q, k, v, _ = tensors
    out = torch.full((case.queries, case.batch, case.heads, case.value_dim), float("nan"))
    lse = torch.full((case.batch, case.heads, case.queries), float("nan"))
    kernel.forward(q, k, v, out, lse, accumulate=False, **case.options())
    return out, lse


def expect_output(
    case: Case, dtype: torch.dtype, tensors: tuple[Tensor, ...], out: Tensor, lse: Tensor
) -> None:
    """``out`` (Q, B, H, V) and ``lse`` (B, H, Q) are within the error budget against fp64."""
    exact = textbook(case, torch.float64, tensors)
    low = textbook(case, torch.float32, tensors, dtype)
    expect_close(f"out of {case} in {dtype}", out, exact[0], low[0])
    expect_close(f"lse of {case} in {dtype}", lse, exact[1], low[1])


def run_backward(case: Case, tensors: tuple[Tensor, ...], kernel: Kernel) -> Results:
    """out and lse of the reference formula, and gradients summed over two calls, each with half of ``dout``."""
    q, k, v, dout = tensors
    out, lse, *_ = textbook(case, torch.float32, tensors)
    half = dout * 0.5
    delta = (out * half.float()).sum(-1).permute(1, 2, 0).contiguous()
    grads = dq, dk, dv = [torch.full(x.shape, float("nan")) for x in (q, k, v)]
    options = case.options()
    for accumulate in (False, True):
        kernel.backward(half, q, k, v, lse, delta, *grads, accumulate=accumulate, **options)
    return out, lse, dq, dk, dv


def expect_gradients(case: Case, dtype: torch.dtype, tensors: tuple[Tensor, ...], kernel: Kernel) -> None:
    """dq, dk and dv are within the error budget against fp64."""
    expect_within_budget(case, dtype, tensors, run_backward(case, tensors, kernel))
