"""The autograd function of distributed attention."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
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
        kept: tuple[Tensor, ...] | None,
        plan: Plan,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        if kept is not None:
            out, lse = (result.view_as(result) for result in kept)
        else:
            with without_autocast(q.device):
                out, lse = plan.run_forward(q, k, v, scale)
            plan.stats.forwards += 1
            if sink is not None:
                out, lse = merge_sink(out, lse, sink)
        ctx.save_for_backward(q, k, v, out, lse, sink)
        ctx.plan, ctx.scale, ctx.layer = plan, scale, plan.stats.place.layer
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    @torch.compiler.disable
    def backward(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, lse, sink = ctx.saved_tensors
        ctx.plan.stats.place.layer = ctx.layer
        with without_autocast(q.device):
            dq, dk, dv = ctx.plan.run_backward(dout.contiguous(), q, k, v, out, lse, ctx.scale)
        return dq, dk, dv, _sink_gradient(sink, dout, out, lse), None, None, None


class LearnedScale(torch.autograd.Function):
    """Queries as they are, and the gradient of the softmax scale, a tensor of one element.

    Scores are scale * (q . k), so the gradient of the scale is the sum of dq * q over all rows, divided by the scale.
    It is that of the local queries: like a parameter's gradient, it is to be summed over the ranks.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, scale: Tensor, value: float) -> Tensor:
        ctx.save_for_backward(q)
        ctx.shape, ctx.dtype, ctx.device, ctx.value = scale.shape, scale.dtype, scale.device, value
        return q.view_as(q)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dq: Tensor) -> tuple[Tensor, Tensor, None]:
        (q,) = ctx.saved_tensors
        gradient = attention_delta(q, dq).sum() / ctx.value
        return dq, gradient.reshape(ctx.shape).to(ctx.device, ctx.dtype), None


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Kernels choose their precision themselves: products in plain torch would be computed in autocast's dtype."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _sink_gradient(sink: Tensor | None, dout: Tensor, out: Tensor, lse: Tensor) -> Tensor | None:
    """Gradient of the sink logit (H,), or None.

    The sink is a column of scores whose value is zero, so its gradient is -sum over rows of p * delta, with
    p = exp(sink - lse).
    """
    if sink is None:
        return None
    probability = (sink.to(lse.dtype)[:, None] - lse).exp()
    return -(probability * attention_delta(out, dout)).sum((0, 2)).to(sink.dtype)
