"""The interface of a kernel, and how one is chosen.

A kernel computes one tile on one rank and accumulates the result. It does not depend on ranks or schedules.

Shapes: S tokens, B batch, H query heads, G key/value heads (G divides H; query head h reads key/value head
h // (H / G)), D and Dv head dims of queries/keys and of values.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.kernels.choose import choose_kernel, listed
from megatron_lightseq.kernels.specs import AUTO, KERNELS, KernelSpec
from megatron_lightseq.kernels.tile_mask import TileMask


@runtime_checkable
class Kernel(Protocol):
    """Attention over one tile. Inputs may have any strides, if the last dimension is contiguous."""

    name: str
    rounds_results: bool
    """Whether :meth:`forward` accepts an ``out`` in q's dtype, and :meth:`backward` gradients in it, when they do not
    accumulate, so that a final result is written in the input dtype without an fp32 copy."""

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
            lse: (B, H, Sq), natural log-sum-exp of the scores of all keys seen so far, accumulator dtype; -inf for
                rows that have seen none.
            mask: which keys each row sees.
            softmax_scale: factor for the scores.
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
            q, k, v: as in :meth:`forward`.
            lse: (B, H, Sq), final log-sum-exp over all tiles; rows with -inf contribute nothing.
            delta: (B, H, Sq), the final sum of out * dout over Dv, accumulator dtype.
            mask, softmax_scale: as in :meth:`forward`.
            accumulate: False to overwrite ``dq, dk, dv``, which may then be uninitialised.
        """


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which partial results and gradients are accumulated: fp64 for fp64, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


LONG_FOR_REFERENCE = 4096
"""Tokens per rank from which ``auto`` warns that the reference kernel holds a square score matrix."""


def dtype_name(dtype: torch.dtype) -> str:
    """The name that kernel specs use for a dtype: ``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


@dataclass(slots=True)
class SoftcappedKernel:
    """A kernel whose scores are bounded by a softcap c, to c * tanh(score / c), after they are scaled."""

    kernel: Any
    """A :class:`Kernel` that takes ``softcap``, as its :class:`~.specs.KernelSpec` says."""
    softcap: float
    name: str
    """The kernel's, with the softcap: ranks compare it."""
    rounds_results: bool

    @staticmethod
    def of(kernel: Kernel, softcap: float) -> SoftcappedKernel:
        """The kernel with this softcap."""
        return SoftcappedKernel(
            kernel, softcap, f"{kernel.name} with softcap {softcap!r}", kernel.rounds_results
        )

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """As the kernel says."""
        return self.kernel.unsupported(q, k, v)

    def forward(self, *tensors: Tensor, **options: Any) -> None:
        """As of :class:`Kernel`."""
        self.kernel.forward(*tensors, **options, softcap=self.softcap)

    def backward(self, *tensors: Tensor, **options: Any) -> None:
        """As of :class:`Kernel`."""
        self.kernel.backward(*tensors, **options, softcap=self.softcap)


def refusal_of(spec: KernelSpec, q: Tensor, k: Tensor, v: Tensor, *, softcap: bool = False) -> str | None:
    """Why a spec excludes these inputs, as a clause about "it" (the kernel), or None."""
    reason = spec.refusal(
        device_type=q.device.type,
        dtype=dtype_name(q.dtype),
        head_dim=q.shape[-1],
        v_head_dim=v.shape[-1],
        has_softcap=softcap,
    )
    if reason is not None:
        return reason
    if len({(x.device, x.dtype) for x in (q, k, v)}) > 1:
        shown = ", ".join(f"{dtype_name(x.dtype)} on {x.device}" for x in (q, k, v))
        return f"it takes q, k and v of one dtype on one device, not {shown}"
    return None


def resolve_kernel(
    kernel: str | Kernel, q: Tensor, k: Tensor, v: Tensor, softcap: float | None = None
) -> Kernel:
    """The kernel of that name, or with ``auto`` the first that takes these inputs; a kernel object is returned as is.

    With a softcap the kernel is wrapped, so that it applies the softcap to its scores.

    Raises:
        UnsupportedError: no kernel has that name, or the one named cannot take these inputs.
    """
    chosen = _named(kernel, q, k, v, softcap is not None) if isinstance(kernel, str) else kernel
    return chosen if softcap is None else SoftcappedKernel.of(chosen, softcap)


def _named(name: str, q: Tensor, k: Tensor, v: Tensor, softcap: bool) -> Kernel:
    """The kernel of a name; warns if ``auto`` is left with the reference and its score matrix is large."""
    choice = choose_kernel(
        name,
        KERNELS,
        what="kernel",
        reason=lambda spec, kernel: refusal_of(spec, q, k, v, softcap=softcap) or kernel.unsupported(q, k, v),
        refused=lambda reason: _refused(name, reason, q, k, v),
    )
    chosen: Kernel = choice.kernel
    if name == AUTO and chosen.name == "reference" and q.shape[0] >= LONG_FOR_REFERENCE:
        _warn_of_square_scores(q, choice.reasons)
    return chosen


def _warn_of_square_scores(q: Tensor, reasons: dict[str, str]) -> None:
    warnings.warn(
        f"kernel 'auto' falls back to the reference kernel for {q.shape[0]} tokens of {q.dtype} on {q.device}: "
        f"its memory grows with the square of the tokens. {listed(reasons)}.",
        stacklevel=3,
    )


def _refused(kernel: str, reason: str, q: Tensor, k: Tensor, v: Tensor) -> UnsupportedError:
    last_resort = refusal_of(KERNELS["reference"], q, k, v)
    return UnsupportedError(
        explain(
            got=f"kernel {kernel!r} for {q.dtype} tensors on {q.device}",
            rule=reason,
            remedy="Choose kernel='auto' or 'reference'"
            if last_resort is None
            else "Cast q, k and v to float32 or bfloat16, on one device",
        )
    )
