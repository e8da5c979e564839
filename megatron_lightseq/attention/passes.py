"""The data that flows through a program: q, k, v to (out, lse) forward, dout to (dq, dk, dv) backward.

Token dimension: 0 in (S, B, H, D) tensors, last in (B, H, S) statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_lightseq.kernels.merge import merge_into
from megatron_lightseq.kernels.registry import Kernel
from megatron_lightseq.kernels.tile_mask import TileMask
from megatron_lightseq.schedule import Payload
from megatron_lightseq.schedule.program import Call

Bundle = tuple[Tensor, ...]
"""The tensors of one payload, all of the same tokens."""


class Pass(Protocol):
    """The data that flows through a program in one direction, and the computations on it."""

    @property
    def own(self) -> dict[Payload, Bundle]:
        """The rank's own shard of every payload: inputs are read, results are overwritten."""

    def compute(
        self, call: Call, mask: TileMask, q_side: Bundle, k_side: Bundle, results: list[Bundle]
    ) -> None:
        """Run the kernel on one rectangle.

        ``results`` are the query side's and, in the backward pass, the key side's. A fresh call overwrites them;
        any other call accumulates into them.
        """

    def clear(self, payload: Payload, bundle: Bundle) -> None:
        """Fill a result bundle with the empty result."""

    def absorb(self, payload: Payload, mine: Bundle, arrived: Bundle) -> None:
        """Combine a result that another rank computed with the rank's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardPass:
    """(q, k, v) to a normalised (out, lse)."""

    own: dict[Payload, Bundle]
    kernel: Kernel
    softmax_scale: float

    @staticmethod
    def over(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kernel: Kernel, scale: float
    ) -> ForwardPass:
        """A pass that reads q, k, v and writes out (S, B, H, Dv) and lse (B, H, S), of the accumulator dtype."""
        own = {Payload.Q: (q,), Payload.KV: (k, v), Payload.OUT: (out, lse)}
        return ForwardPass(own=own, kernel=kernel, softmax_scale=scale)

    def compute(
        self, call: Call, mask: TileMask, q_side: Bundle, k_side: Bundle, results: list[Bundle]
    ) -> None:
        """Merge the rectangle into its (out, lse), or overwrite them if the call is fresh."""
        (q,), (k, v), (out, lse) = q_side, k_side, results[0]
        self.kernel.forward(
            q, k, v, out, lse, mask=mask, softmax_scale=self.softmax_scale, accumulate=not call.fresh
        )

    def clear(self, payload: Payload, bundle: Bundle) -> None:
        """Rows that have seen no key: out 0, lse -inf."""
        out, lse = bundle
        out.zero_()
        lse.fill_(float("-inf"))

    def absorb(self, payload: Payload, mine: Bundle, arrived: Bundle) -> None:
        """Merge by log-sum-exp."""
        merge_into(*mine, *arrived)


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardPass:
    """(q, k, v, dout, lse, delta) to (dq, dk, dv)."""

    own: dict[Payload, Bundle]
    kernel: Kernel
    softmax_scale: float

    @staticmethod
    def over(
        inputs: dict[Payload, Bundle], grads: dict[Payload, Bundle], kernel: Kernel, scale: float
    ) -> BackwardPass:
        """A pass that reads ``inputs`` and writes ``grads``, bundles by payload."""
        return BackwardPass(own={**inputs, **grads}, kernel=kernel, softmax_scale=scale)

    def compute(
        self, call: Call, mask: TileMask, q_side: Bundle, k_side: Bundle, results: list[Bundle]
    ) -> None:
        """Add the rectangle's gradients, or overwrite if the call is fresh."""
        (q, dout, lse, delta), (k, v) = q_side, k_side
        (dq,), (dk, dv) = results
        tensors = (dout, q, k, v, lse, delta, dq, dk, dv)
        fresh, scale = call.fresh, self.softmax_scale
        self.kernel.backward(*tensors, mask=mask, softmax_scale=scale, accumulate=not fresh)

    def clear(self, payload: Payload, bundle: Bundle) -> None:
        """Zero gradients."""
        for tensor in bundle:
            tensor.zero_()

    def absorb(self, payload: Payload, mine: Bundle, arrived: Bundle) -> None:
        """Add the gradients that arrived, in the order of the schedule."""
        for total, part in zip(mine, arrived, strict=True):
            total += part
