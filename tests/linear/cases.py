"""Inputs of every kind of linear attention, and the recurrence that all results are compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import megatron_lightseq as mls
from megatron_lightseq.kernels.linear.contract import Documents, LinearKernel
from megatron_lightseq.kernels.linear.reference import recurrence
from megatron_lightseq.linear.visible import Packing
from megatron_lightseq.mask import Mask
from megatron_lightseq.transport import run_loopback
from megatron_lightseq.transport.group import Group

FAMILIES = ("linear", "scalar", "strong", "vector", "delta", "gdn", "kda")
"""Plain, one decay a head (weak and strong), one a channel, the delta rule alone and with each kind of decay."""

Inputs = list[Tensor | None]
"""q, k, v, log_decay, beta."""


def inputs(
    family: str, tokens: int, heads: int = 2, kv_heads: int | None = None, dtype: torch.dtype = torch.float64
) -> tuple[Inputs, Tensor]:
    """Inputs for a batch of 2 with head dims 5 and 4, and a gradient of the output."""
    source = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    groups = heads if kv_heads is None else kv_heads
    q, k, v = random(tokens, 2, heads, 5), random(tokens, 2, groups, 5), random(tokens, 2, groups, 4)
    log_decay = beta = None
    if family in ("scalar", "strong", "gdn"):
        log_decay = -random(tokens, 2, heads).abs() * (8 if family == "strong" else 0.3)
    if family in ("vector", "kda"):
        log_decay = -random(tokens, 2, heads, 5).abs() * 0.3
    if family in ("delta", "gdn", "kda"):
        beta, k = random(tokens, 2, heads).sigmoid(), normalize(k, dim=-1)
    dout = random(tokens, 2, heads, 4).to(dtype)
    return [None if x is None else x.to(dtype) for x in (q, k, v, log_decay, beta)], dout


def expected(tensors: Inputs, dout: Tensor, masks: list[Mask]) -> list[Tensor]:
    """The output and the gradients of all inputs, by the recurrence."""
    leaves = [None if x is None else x.clone().requires_grad_() for x in tensors]
    q, k, v, log_decay, beta = leaves
    assert q is not None
    assert k is not None
    assert v is not None
    heads, tokens = q.shape[2], len(q)
    k, v = (x.repeat_interleave(heads // x.shape[2], 2) for x in (k, v))
    ids = torch.stack([Packing.of(mask, tokens).ids(range(-1, tokens), q.device) for mask in masks])
    out, _ = recurrence(
        q,
        k,
        v,
        log_decay,
        beta,
        q.new_zeros(q.shape[1], heads, q.shape[3], v.shape[3]),
        scale=q.shape[3] ** -0.5,
        documents=Documents(ids[:, 1:], ids[:, 0]),
    )
    return [out.detach(), *torch.autograd.grad(out, [x for x in leaves if x is not None], dout)]


def one_rank(
    group: Group | None,
    tensors: Inputs,
    dout: Tensor,
    mask: Mask | list[Mask],
    kernel: str | LinearKernel = "torch",
    **settings: Any,
) -> list[Tensor]:
    """A rank's output and gradients."""
    size, rank = (1, 0) if group is None else (group.size(), group.rank())
    layout = mls.SequenceLayout.contiguous(size)
    leaves = [None if x is None else layout.shard(x, rank, 0).clone().requires_grad_() for x in tensors]
    q, k, v, log_decay, beta = leaves
    assert q is not None
    assert k is not None
    assert v is not None
    out = mls.dist_linear_attention(
        q, k, v, log_decay=log_decay, beta=beta, group=group, mask=mask, kernel=kernel, **settings
    )
    grads = torch.autograd.grad(out, [x for x in leaves if x is not None], layout.shard(dout, rank, 0))
    return [out.detach(), *grads]


def attended(
    size: int,
    tensors: Inputs,
    dout: Tensor,
    mask: Mask | list[Mask] | None = None,
    kernel: str | LinearKernel = "torch",
    **settings: Any,
) -> list[Tensor]:
    """The whole output and gradients, computed by ``size`` ranks."""
    mask = Mask.causal() if mask is None else mask
    parts = run_loopback(size, lambda group: one_rank(group, tensors, dout, mask, kernel, **settings))
    layout = mls.SequenceLayout.contiguous(size)
    return [layout.unshard(list(shards), 0) for shards in zip(*parts, strict=True)]


def error(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest difference, relative to the largest number where that is above 1."""
    return max(
        ((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in zip(got, want, strict=True)
    )
