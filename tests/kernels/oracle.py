"""Checks attention kernels: random tiles, fp64 results, and an error budget.

The budget: a kernel's error against fp64 may be twice that of the textbook formula evaluated in the same low
precision, plus a few roundings. It applies to the largest error and to the RMS error, and NaN always fails.

Shape letters: Q query tokens, K key tokens, B batch, H query heads, G key/value heads, D and V head dims.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_lightseq.kernels.cpu import CpuKernel
from megatron_lightseq.kernels.reference import visible
from megatron_lightseq.kernels.registry import Kernel
from megatron_lightseq.kernels.tile_mask import TileMask

NAMES = ("out", "lse", "dq", "dk", "dv")
Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
FAR = 1 << 40


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One tile."""

    queries: int
    keys: int
    batch: int = 1
    heads: int = 2
    groups: int = 1
    head_dim: int = 16
    value_dim: int = 16
    band_lo: int = -FAR
    band_hi: int = FAR
    ranges: Literal["none", "documents", "random", "empty"] = "none"
    amplitude: float = 1.0
    """Standard deviation of the queries: large ones make a sharp softmax."""
    softcap: float = 0.0
    """c in c * tanh(score / c); 0: none."""

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5

    def options(self) -> dict[str, Any]:
        """What every call of a kernel takes besides tensors."""
        capped = {"softcap": self.softcap} if self.softcap else {}
        return {"mask": self.mask(), "softmax_scale": self.softmax_scale, **capped}

    def mask(self) -> TileMask:
        return TileMask(self.band_lo, self.band_hi, self.key_ranges())

    def key_ranges(self) -> Tensor | None:
        generator = torch.Generator().manual_seed(1)
        begin = torch.zeros(self.queries, dtype=torch.int32)
        end = torch.full((self.queries,), self.keys, dtype=torch.int32)
        if self.ranges == "none":
            return None
        if self.ranges == "documents":  # three documents, in both queries and keys
            for document in range(3):
                rows = slice(document * self.queries // 3, (document + 1) * self.queries // 3)
                begin[rows], end[rows] = document * self.keys // 3, (document + 1) * self.keys // 3
        elif self.ranges == "random":  # a third of them empty, some ending outside
            begin = torch.randint(-3, self.keys, begin.shape, generator=generator).int()
            end = (
                begin + torch.randint(-self.keys // 2, self.keys + 1, begin.shape, generator=generator).int()
            )
        else:
            end = begin
        return torch.stack([begin, end])


def inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q (Q,B,H,D), k (K,B,G,D), v (K,B,G,V), dout (Q,B,H,V)"""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    q = normal(case.queries, case.batch, case.heads, case.head_dim) * case.amplitude
    k = normal(case.keys, case.batch, case.groups, case.head_dim)
    v = normal(case.keys, case.batch, case.groups, case.value_dim)
    return q, k, v, normal(case.queries, case.batch, case.heads, case.value_dim)


def textbook(
    case: Case, dtype: torch.dtype, tensors: tuple[Tensor, ...], weights_dtype: torch.dtype | None = None
) -> Results:
    """Attention and its gradients by the formulas, in ``dtype``; P and dS rounded to ``weights_dtype``."""
    q, k, v, dout = (x.to(dtype) for x in tensors)
    group = case.heads // case.groups
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)

    def rounded(x: Tensor) -> Tensor:
        return x if weights_dtype is None else x.to(weights_dtype).to(dtype)

    seen = visible(case.mask(), case.queries, case.keys, q.device)
    scores_BHQK = torch.einsum("qbhd,kbhd->bhqk", q, k) * case.softmax_scale
    slopes_BHQK: Tensor | float = 1.0
    if case.softcap:
        tanh_BHQK = torch.tanh(scores_BHQK / case.softcap)
        scores_BHQK, slopes_BHQK = case.softcap * tanh_BHQK, 1 - tanh_BHQK.square()
    scores_BHQK = scores_BHQK.masked_fill(~seen, float("-inf"))
    lse_BHQ = scores_BHQK.logsumexp(-1)
    weights_BHQK = (scores_BHQK - lse_BHQ.unsqueeze(-1)).exp().masked_fill(~seen, 0.0)
    out = torch.einsum("bhqk,kbhd->qbhd", rounded(weights_BHQK), v)
    delta_BHQ = (out * dout).sum(-1).permute(1, 2, 0)
    dweights_BHQK = torch.einsum("qbhd,kbhd->bhqk", dout, v)
    dscores_BHQK = weights_BHQK * (dweights_BHQK - delta_BHQ.unsqueeze(-1)) * slopes_BHQK
    dscores_BHQK = rounded(dscores_BHQK) * case.softmax_scale
    dq = torch.einsum("bhqk,kbhd->qbhd", dscores_BHQK, k)
    dk = torch.einsum("bhqk,qbhd->kbhd", dscores_BHQK, q)
    dv = torch.einsum("bhqk,qbhd->kbhd", rounded(weights_BHQK), dout)
    return out, lse_BHQ, dq, _sum_group(dk, group), _sum_group(dv, group)


def _sum_group(gradient: Tensor, group: int) -> Tensor:
    return gradient.unflatten(2, (-1, group)).sum(3)


def run_kernel(case: Case, tensors: tuple[Tensor, ...], kernel: Kernel | None = None) -> Results:
    """Runs the kernel (default: the CPU kernel) forward and backward; outputs start as NaN."""
    kernel = kernel or CpuKernel()
    q, k, v, dout = tensors
    out = torch.full((case.queries, case.batch, case.heads, case.value_dim), float("nan"))
    lse = torch.full((case.batch, case.heads, case.queries), float("nan"))
    options = case.options()
    kernel.forward(q, k, v, out, lse, accumulate=False, **options)
    dq, dk, dv = (torch.zeros(x.shape) for x in (q, k, v))
    kernel.backward(dout, q, k, v, lse, delta(out, dout), dq, dk, dv, **options)
    return out, lse, dq, dk, dv


def delta(out: Tensor, dout: Tensor) -> Tensor:
    """(B, H, Q): sum of out * dout, which the backward pass of the softmax subtracts."""
    return (out * dout.float()).sum(-1).permute(1, 2, 0).contiguous()


def check(case: Case, dtype: torch.dtype) -> None:
    """Checks that the CPU kernel keeps the error budget in all five results of a random tile."""
    tensors = inputs(case, dtype)
    expect_within_budget(case, dtype, tensors, run_kernel(case, tensors))


def expect_within_budget(case: Case, dtype: torch.dtype, tensors: tuple[Tensor, ...], got: Results) -> None:
    exact = textbook(case, torch.float64, tensors)
    naive = textbook(case, torch.float32, tensors, None if dtype == torch.float32 else dtype)
    for name, result, want, low in zip(NAMES, got, exact, naive, strict=True):
        # dS is the difference of two sums of value_dim products. If they cancel, only rounding error remains.
        cancelled = case.value_dim**0.5 if name in ("dq", "dk") else 1.0
        expect_close(f"{name} of {case} in {dtype}", result, want, low, cancelled)


def expect_close(what: str, result: Tensor, want: Tensor, low: Tensor, cancelled: float = 1.0) -> None:
    """error(result) <= 2 * error(low) + eps, all against ``want`` (fp64), where infinities must agree exactly."""
    infinite = want.isinf()
    unequal = infinite & (result.double() != want)
    assert not unequal.any(), f"{what}: infinities differ, {where(unequal, result, want)}"
    if infinite.all():
        return
    error, budget = ((x.double() - want).masked_fill(infinite, 0.0) for x in (result, low))
    eps = 8 * torch.finfo(torch.float32).eps * max(cancelled, float(want[~infinite].abs().max()))
    largest, allowed = float(error.abs().max()), 2 * float(budget.abs().max()) + eps
    beyond = ~(error.abs() <= allowed)
    assert largest <= allowed, (
        f"{what}: largest error {largest:.3e}, allowed {allowed:.3e}, {where(beyond, result, want)}"
    )
    finite = int((~infinite).sum())
    rms, budget_rms = (float((x.square().sum() / finite).sqrt()) for x in (error, budget))
    allowed = 2 * budget_rms + eps
    assert rms <= allowed, f"{what}: RMS error {rms:.3e}, allowed {allowed:.3e}"


def where(wrong: Tensor, result: Tensor, want: Tensor) -> str:
    """Describes the wrong elements: how many, the first one, and the range of indices in each dimension."""
    indices = wrong.nonzero()
    first = tuple(indices[0].tolist())
    ends = zip(indices.amin(0).tolist(), indices.amax(0).tolist(), strict=True)
    span = ", ".join(f"{low}..{high}" for low, high in ends)
    return (
        f"{len(indices)} of {wrong.numel()} elements, the first at {first}: {float(result[first]):.6g}, "
        f"wanted {float(want[first]):.6g}; all of them within ({span})"
    )


def with_keys(case: Case, first: int, last: int) -> Case:
    """The same queries against keys [first, last) only (band masks)."""
    return replace(case, keys=last - first, band_lo=case.band_lo - first, band_hi=case.band_hi - first)
