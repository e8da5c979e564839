"""How one direction of distributed attention is executed: by a schedule's program, optionally between two all-to-all
exchanges of heads.

A *run* turns local shards into local results. Which kind of run a method needs follows from its
:class:`schedule.Method`.

Shapes: q (S, B, H, D), k (S, B, G, D), v (S, B, G, Dv), out and dout (S, B, H, Dv), lse and delta (B, H, S).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_lightseq.attention.passes import BackwardPass, ForwardPass
from megatron_lightseq.attention.runtime import BoundProgram, Runtime
from megatron_lightseq.attention.stats import AttentionStats
from megatron_lightseq.kernels.delta import attention_delta
from megatron_lightseq.kernels.registry import Kernel, accumulator_dtype
from megatron_lightseq.schedule import Payload

Gradients = tuple[Tensor, Tensor, Tensor]


class Run(Protocol):
    """How attention over a group is executed, in the direction that it was made for."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """``out`` in q's dtype and ``lse`` in the accumulator dtype; collective."""

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, scale: float
    ) -> Gradients:
        """dq, dk and dv, in the accumulator dtype or in the inputs'; collective."""


@dataclass(frozen=True, slots=True)
class TileRun:
    """Runs the program of one direction."""

    program: BoundProgram
    kernel: Kernel
    runtime: Runtime
    gradients_are_parts: bool = False
    """Gradients will be added to those of other ranks, so they must not be rounded yet."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Run the program from q, k and v to ``out`` and ``lse``."""
        acc = accumulator_dtype(q.dtype)
        dtype = q.dtype if self._is_rounded_at_once() else acc
        out = torch.empty((*q.shape[:3], v.shape[3]), dtype=dtype, device=q.device)
        lse = torch.empty((q.shape[1], q.shape[2], q.shape[0]), dtype=acc, device=q.device)
        self.runtime.run(self.program, ForwardPass.over(q, k, v, out, lse, self.kernel, scale))
        return out.to(q.dtype), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, scale: float
    ) -> Gradients:
        """Run the program to dq, dk and dv, which are in the inputs' dtype if nothing will be added to them."""
        is_final = self._is_rounded_at_once() and not self.gradients_are_parts
        dtype = q.dtype if is_final else accumulator_dtype(q.dtype)
        dq, dk, dv = (torch.empty(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
        inputs = {Payload.QDO: (q, dout, lse, delta), Payload.KV: (k, v)}
        grads = {Payload.DQ: (dq,), Payload.DKV: (dk, dv)}
        self.runtime.run(self.program, BackwardPass.over(inputs, grads, self.kernel, scale))
        return dq, dk, dv

    def _is_rounded_at_once(self) -> bool:
        """Whether results are written in their final dtype: by the kernel, or when the last parts are joined."""
        program = self.program.program
        return program.joins is not None or (self.kernel.rounds_results and not program.merges)


@dataclass(frozen=True, slots=True)
class Plan:
    """How both directions of an attention call are executed; they may use different methods."""

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
