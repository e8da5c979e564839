"""Latent attention under tensor parallelism with Megatron's own layers.

All heads share the keys that RoPE turns. Each tensor-parallel rank uses them for its own heads, so their gradient is a
sum over ranks; but the gather that brings them together (transformer/multi_latent_attention.py) hands each rank back
its own part of its own gradient only. Transformer Engine's layers do not come by that gather.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.transformer.multi_latent_attention import MLASelfAttention

from megatron_lightseq.megatron.rebind import rebind


class _SumOfGradients(torch.autograd.Function):
    """The identity, whose gradient is summed over a group.

    Megatron's own (``copy_to_tensor_model_parallel_region``) loses the sum of a gradient that is not contiguous.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class SharedKeyGather:
    """Megatron's ``gather_from_tensor_model_parallel_region`` for one attention, with the sum that is missing."""

    def __init__(self, attention: MLASelfAttention) -> None:
        self._widths = [attention.config.kv_lora_rank, attention.config.qk_pos_emb_head_dim]
        self._group = attention.pg_collection.tp
        self._latent: torch.Tensor | None = None
        attention.linear_kv_down_proj.register_forward_hook(self._remember)

    def _remember(self, module: torch.nn.Module, args: Any, output: tuple[torch.Tensor, Any]) -> None:
        del module, args
        self._latent = output[0]

    def __call__(self, part: torch.Tensor) -> torch.Tensor:
        """(..., width / TP) to (..., width); of keys and values, the last columns are the shared keys."""
        whole: torch.Tensor = gather_from_tensor_model_parallel_region(part)
        if part is not self._latent:
            return whole
        self._latent = None
        latent, keys = whole.split(self._widths, dim=-1)
        return torch.cat([latent, _SumOfGradients.apply(keys, self._group)], dim=-1)


def sum_shared_keys(model: torch.nn.Module) -> int:
    """Have every latent attention below ``model`` add up the gradient of its shared keys over tensor-parallel ranks.

    Returns:
        How many attentions there were.
    """
    found = 0
    for module in model.modules():
        if isinstance(module, MLASelfAttention):
            found += rebind(module, "gather_from_tensor_model_parallel_region", SharedKeyGather(module))
    return found
