"""Distributed attention as one operator of torch, which ``torch.compile`` traces without a graph break.

Schedules, buffers and messages are no tensors, so they stay behind the operator: a graph has ``mls::dist_attention``
and, for its gradients, ``mls::dist_attention_backward``, with shapes from their fake implementations.

Shape letters as in :mod:`distributed`.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from megatron_lightseq.attention.distributed import DistAttention
from megatron_lightseq.attention.inputs import autocast_inputs


class OperatorAttention(torch.nn.Module):
    """A :class:`DistAttention` for models that are compiled, with the mask that it was made with.

    ``torch.compile(model, fullgraph=True)`` holds, and compiled graphs call it in the same order on all ranks.
    """

    def __init__(self, attention: DistAttention) -> None:
        super().__init__()
        self._attention = attention
        self._number = next(_numbers)
        _known[self._number] = attention

    def forward(self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None) -> Tensor:
        """The local output (S, B, H, Dv); q, k, v and softmax_scale as for :func:`dist_attention`."""
        q, k, v = autocast_inputs(q, k, v)
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        out: Tensor = torch.ops.mls.dist_attention(q, k, v, self._number, scale)[0]
        return out


_numbers = itertools.count()
_known: weakref.WeakValueDictionary[int, DistAttention] = weakref.WeakValueDictionary()
"""Graphs hold tensors and numbers, so that they name an attention by its number."""


@torch.library.custom_op("mls::dist_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, attention: int, scale: float) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        out, lse = _known[attention].forward_with_lse(q, k, v, scale)
    return out.contiguous(), lse.contiguous()


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, attention: int, scale: float) -> tuple[Tensor, Tensor]:
    tokens, rows, heads = q.shape[:3]
    accumulator = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(tokens, rows, heads, v.shape[3]), q.new_empty(rows, heads, tokens, dtype=accumulator)


@torch.library.custom_op("mls::dist_attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    attention: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        result = _known[attention].reattach(inputs[0], inputs[1], inputs[2], (out, lse), scale)
        dq, dk, dv = torch.autograd.grad(result, inputs, dout)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(q).contiguous(),
        torch.empty_like(k).contiguous(),
        torch.empty_like(v).contiguous(),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.attention, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.mls.dist_attention_backward(dout, *ctx.saved_tensors, ctx.attention, ctx.scale)
    return *found, None, None


_forward.register_autograd(_gradients, setup_context=_keep)
