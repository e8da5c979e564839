"""The autograd function of distributed attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_lightseq.attention.plan import Plan
from megatron_lightseq.kernels.delta import attention_delta
from megatron_lightseq.kernels.merge import merge_sink


class AttentionFunction(torch.autograd.Function):
    """Runs a plan's forward, or takes a kept result instead, and its backward."""

    @staticmethod
    @torch.compiler.disable
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sink: Tensor | None,
        kept: tuple[Tensor, Tensor] | None,
        plan: Plan,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        if kept is not None:
            out, lse = (result.view_as(result) for result in kept)
        else:
            out, lse = plan.run_forward(q, k, v, scale)
            plan.stats.forwards += 1
            if sink is not None:
                out, lse = merge_sink(out, lse, sink)
        ctx.save_for_backward(q, k, v, out, lse, sink)
        ctx.plan, ctx.scale = plan, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    @torch.compiler.disable
    def backward(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, lse, sink = ctx.saved_tensors
        dq, dk, dv = ctx.plan.run_backward(dout.contiguous(), q, k, v, out, lse, ctx.scale)
        return dq, dk, dv, _sink_gradient(sink, dout, out, lse), None, None, None


def _sink_gradient(sink: Tensor | None, dout: Tensor, out: Tensor, lse: Tensor) -> Tensor | None:
    """Gradient of the sink logit (H,), or None.

    The sink is a column of scores whose value is zero, so its gradient is -sum over rows of p * delta, with
    p = exp(sink - lse).
    """
    if sink is None:
        return None
    probability = (sink.to(lse.dtype)[:, None] - lse).exp()
    return -(probability * attention_delta(out, dout)).sum((0, 2)).to(sink.dtype)
