"""The contract of a kernel, and how one is chosen.

A kernel computes one tile on one rank and accumulates: it knows neither ranks nor schedules.

Shapes: S tokens, B batch, H query heads, G key/value heads (G divides H; query head h reads key/value head
h // (H / G)), D and Dv head dims of queries/keys and of values.
"""

from __future__ import annotations

import difflib
import importlib
import warnings
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.mask import Mask


@dataclass(frozen=True, slots=True)
class TileMask:
    """Which keys of a tile each query row may see.

    Row i sees key j iff ``i + band_lo <= j <= i + band_hi`` and, where ``key_ranges`` is given,
    ``key_ranges[0, i] <= j < key_ranges[1, i]``.
    """

    band_lo: int
    band_hi: int
    key_ranges: Tensor | None = None
    """int32, (2, Sq)."""

    @staticmethod
    def of(mask: Mask, queries: range, keys: range, device: torch.device) -> TileMask:
        """The tile of ``mask`` at these global positions."""
        band_lo, band_hi = mask.band(queries, keys)
        if mask.cu_seqlens is None:
            return TileMask(band_lo, band_hi)
        ranges = torch.zeros(2, len(queries), dtype=torch.int32)
        for segment in mask.segments(queries, keys):
            ranges[0, segment.q_start : segment.q_stop] = segment.k_start
            ranges[1, segment.q_start : segment.q_stop] = segment.k_stop
        return TileMask(band_lo, band_hi, ranges.to(device))


@runtime_checkable
class Kernel(Protocol):
    """Fused or naive attention over one tile. Inputs may have any strides with the last dimension contiguous."""

    name: str
    rounds_results: bool
    """Whether :meth:`forward` also takes an ``out`` of q's dtype where it does not accumulate, and :meth:`backward`
    such gradients: a result that nothing will be added to then never exists in the accumulator dtype."""

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """Why this kernel cannot take these inputs, or None."""

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
        """Merge the tile into ``(out, lse)`` in place by online softmax (DistFlashAttn, Algorithm 3).

        Args:
            q: (Sq, B, H, D). k: (Sk, B, G, D). v: (Sk, B, G, Dv). All of one dtype.
            out: (Sq, B, H, Dv), normalised partial output, in the accumulator dtype (see ``rounds_results``).
            lse: (B, H, Sq), natural log-sum-exp of the scores seen so far, accumulator dtype; -inf for none.
            mask: which keys each row sees; everything else is skipped.
            softmax_scale: factor of the scores.
            accumulate: False to overwrite ``out`` and ``lse``, which may then be uninitialised.
        """

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
        """Add the tile's gradients to ``dq, dk, dv`` (shapes of q, k, v; accumulator dtype, see ``rounds_results``).

        Args:
            dout: (Sq, B, H, Dv), gradient of the final output, q's dtype.
            lse: (B, H, Sq), FINAL log-sum-exp over all tiles; rows of -inf contribute nothing.
            delta: (B, H, Sq), sum of out * dout over Dv, accumulator dtype.
            accumulate: False to overwrite ``dq, dk, dv``, which may then be uninitialised.
        """


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for fp32 and below, fp64 for fp64: partial results and gradients are merged in it."""
    return torch.float64 if dtype == torch.float64 else torch.float32


_KERNELS = {
    "cuda": "megatron_lightseq.kernels.cuda:CudaKernel",
    "cpu": "megatron_lightseq.kernels.cpu:CpuKernel",
    "reference": "megatron_lightseq.kernels.reference:ReferenceKernel",
    "flash_attn": "megatron_lightseq.kernels.flash_attn:FlashAttnKernel",
    "sdpa": "megatron_lightseq.kernels.sdpa:SdpaKernel",
}
"""Name -> class. ``auto`` tries them in this order; reference takes anything, so what follows is chosen by name."""


LONG_FOR_REFERENCE = 4096
"""Tokens a rank from which the reference kernel's square score matrix is worth a warning."""


def kernel_names() -> tuple[str, ...]:
    """Every name that ``kernel=`` accepts."""
    return ("auto", *_KERNELS)


def _load(name: str) -> Kernel:
    module, _, attribute = _KERNELS[name].partition(":")
    kernel: Kernel = getattr(importlib.import_module(module), attribute)()
    return kernel


def _first_supported(q: Tensor, k: Tensor, v: Tensor) -> Kernel:
    """What ``auto`` stands for; warns where only the reference is left and its score matrix gets large."""
    reasons: list[str] = []
    for name in _KERNELS:
        candidate = _load(name)
        reason = candidate.unsupported(q, k, v)
        if reason is None:
            if name == "reference" and q.shape[0] >= LONG_FOR_REFERENCE:
                warnings.warn(
                    f"kernel 'auto' has only the reference left for {q.shape[0]} tokens of {q.dtype} on {q.device}: "
                    f"its memory grows with their square. {'; '.join(reasons)}.",
                    stacklevel=2,
                )
            return candidate
        reasons.append(f"{name}: {reason}")
    raise AssertionError("the reference takes everything")


def resolve_kernel(kernel: str | Kernel, q: Tensor, k: Tensor, v: Tensor) -> Kernel:
    """The kernel of that name, or with ``auto`` the first that takes these inputs.

    Raises:
        UnsupportedError: no kernel has that name, or the one named cannot take these inputs.
    """
    if not isinstance(kernel, str):
        return kernel
    if kernel == "auto":
        return _first_supported(q, k, v)
    if kernel not in _KERNELS:
        near = difflib.get_close_matches(kernel, kernel_names(), n=1)
        raise UnsupportedError(
            explain(
                got=f"kernel {kernel!r}",
                rule=f"the kernels are {', '.join(kernel_names())}",
                remedy=f"Did you mean {near[0]!r}" if near else "Choose one of them",
            )
        )
    chosen = _load(kernel)
    reason = chosen.unsupported(q, k, v)
    if reason is not None:
        raise UnsupportedError(
            explain(
                got=f"kernel {kernel!r} for {q.dtype} tensors on {q.device}",
                rule=reason,
                remedy="Choose kernel='auto' or 'reference'",
            )
        )
    return chosen
