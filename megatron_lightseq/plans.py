"""What attention runs in one direction: tiles by a schedule, alone or with heads exchanged around them.

A *run* takes local shards to local results. All of them share one runtime; which of them a method needs is said by
its :class:`schedule.Method`.

Shapes: q (S, B, H, D), k (S, B, G, D), v (S, B, G, Dv), out and dout (S, B, H, Dv), lse and delta (B, H, S).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_lightseq.exchange import HeadExchange, expand, fold
from megatron_lightseq.kernels.delta import attention_delta
from megatron_lightseq.kernels.registry import Kernel, accumulator_dtype
from megatron_lightseq.runtime import AttentionStats, BackwardPass, BoundProgram, ForwardPass, Runtime
from megatron_lightseq.schedule import Payload

Gradients = tuple[Tensor, Tensor, Tensor]


class Run(Protocol):
    """Attention over a group, in the directions that it was made for."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """``out`` in q's dtype and ``lse`` in the accumulator dtype."""

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, scale: float
    ) -> Gradients:
        """dq, dk, dv in the accumulator dtype or in the inputs'."""


@dataclass(frozen=True, slots=True)
class TileRun:
    """Tiles by a schedule: the program of one direction."""

    program: BoundProgram
    kernel: Kernel
    runtime: Runtime
    gradients_are_parts: bool = False
    """Others will be added to them, so that they must not be rounded yet."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Follow the program from queries, keys and values to ``out`` and ``lse``."""
        acc = accumulator_dtype(q.dtype)
        dtype = q.dtype if self._is_rounded_by_kernel() else acc
        out = torch.empty((*q.shape[:3], v.shape[3]), dtype=dtype, device=q.device)
        lse = torch.empty((q.shape[1], q.shape[2], q.shape[0]), dtype=acc, device=q.device)
        self.runtime.run(self.program, ForwardPass.over(q, k, v, out, lse, self.kernel, scale))
        return out.to(q.dtype), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, scale: float
    ) -> Gradients:
        """Follow the program to dq, dk, dv, in the inputs' dtype where nothing is added up."""
        is_final = self._is_rounded_by_kernel() and not self.gradients_are_parts
        dtype = q.dtype if is_final else accumulator_dtype(q.dtype)
        dq, dk, dv = (torch.empty(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
        inputs = {Payload.QDO: (q, dout, lse, delta), Payload.KV: (k, v)}
        grads = {Payload.DQ: (dq,), Payload.DKV: (dk, dv)}
        self.runtime.run(self.program, BackwardPass.over(inputs, grads, self.kernel, scale))
        return dq, dk, dv

    def _is_rounded_by_kernel(self) -> bool:
        return self.kernel.rounds_results and not self.program.program.merges


@dataclass(frozen=True, slots=True)
class HeadRun:
    """Heads exchanged for tokens, another run for this rank's share of the heads, and the exchange back.

    The backward exchanges its inputs again instead of keeping both forms of them: attention that was kept over
    recomputation then needs nothing of the forward's, and neither holds more memory than the other.
    """

    exchange: HeadExchange
    inner: Run

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Trade, attend with this rank's heads, trade back."""
        cut = self.exchange.cut
        q_merged, *kv = self.exchange.to_heads(([q], cut.heads), ([k, v], cut.groups))
        k_merged, v_merged = self._expanded(kv)
        if self.exchange.num_heads:
            out, lse = self.inner.forward(q_merged, k_merged, v_merged, scale)
        else:  # more ranks than heads
            out = q_merged.new_empty((*q_merged.shape[:3], v.shape[3]))
            lse = q_merged.new_empty(
                (q_merged.shape[1], 0, q_merged.shape[0]), dtype=accumulator_dtype(q.dtype)
            )
        out, lse = self.exchange.to_tokens([out, lse], cut.heads)
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, scale: float
    ) -> Gradients:
        """The same way for gradients; those of shared keys and values are added up over the ranks that used them."""
        cut = self.exchange.cut
        dout_m, q_m, lse_m, delta_m, *kv = self.exchange.to_heads(
            ([dout, q, lse, delta], cut.heads), ([k, v], cut.groups)
        )
        k_m, v_m = self._expanded(kv)
        if self.exchange.num_heads:
            dq, dk, dv = self.inner.backward(dout_m, q_m, k_m, v_m, lse_m, delta_m, scale)
        else:
            dq, dk, dv = (x.to(accumulator_dtype(x.dtype)) for x in (q_m, k_m, v_m))
        (dq,) = self.exchange.to_tokens([dq.to(q.dtype)], cut.heads)
        dk, dv = (fold(grad, self._group_of_head(), self._num_groups()) for grad in (dk, dv))
        if cut.groups_are_disjoint:  # final already, and half as many bytes
            dk, dv = dk.to(k.dtype), dv.to(v.dtype)
        dk, dv = self.exchange.to_tokens([dk, dv], cut.groups, add=not cut.groups_are_disjoint)
        return dq, dk, dv

    def _expanded(self, keys_and_values: list[Tensor]) -> list[Tensor]:
        """With a copy for each query head where a kernel could not find a query head's keys by division."""
        index = self._group_of_head()
        return [expand(x, index) for x in keys_and_values]

    def _group_of_head(self) -> list[int] | None:
        return self.exchange.cut.group_of_head(self.exchange.member)

    def _num_groups(self) -> int:
        return len(self.exchange.cut.groups[self.exchange.member])


@dataclass(frozen=True, slots=True)
class Plan:
    """Both directions, each with a run of its own; they may follow different methods."""

    forward: Run
    backward: Run
    stats: AttentionStats

    def run_forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """``out`` (S, B, H, Dv) in q's dtype and ``lse`` (B, H, S) in the accumulator dtype; collective."""
        return self.forward.forward(q, k, v, scale)

    def run_backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> Gradients:
        """dq, dk, dv in the inputs' shapes and dtypes, from the forward's ``out`` and ``lse``; collective."""
        dq, dk, dv = self.backward.backward(dout, q, k, v, lse, attention_delta(out, dout), scale)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
