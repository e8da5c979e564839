"""Latent attention (MLA) with Megatron's own layers: what it lacks without Transformer Engine, in two places.

All heads share the keys that RoPE turns. Each tensor-parallel rank uses them for its own heads, so their gradient is a
sum over ranks; but the gather that brings them together (transformer/multi_latent_attention.py) hands each rank back
its own part of its own gradient only. Transformer Engine's layers do not come by that gather.

Values may be narrower than queries and keys; ``DotProductAttention`` takes one width for all.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_lightseq.megatron.fixes.rebind import rebind


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
        groups = getattr(attention, "pg_collection", None) or attention.model_comm_pgs  # the latter in 0.14
        self._group = groups.tp
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

    Where there is one such rank, and where Megatron does not gather, nothing changes; nor by a second call.

    Returns:
        How many methods call the gather now.
    """
    found = 0
    for module in model.modules():
        if not isinstance(module, MLASelfAttention) or module.config.tensor_model_parallel_size == 1:
            continue
        if not hasattr(module, _MENDED):
            found += rebind(module, _GATHER, SharedKeyGather(module))
            setattr(module, _MENDED, True)
    return found


_GATHER, _MENDED = "gather_from_tensor_model_parallel_region", "sums_shared_keys"


class LatentDotProductAttention(DotProductAttention):
    """Megatron's attention for values of another width than queries: zeros fill up what is narrower.

    Scores, mask, softmax and products are Megatron's, on one context-parallel rank as there; zeros add nothing to a
    score, and their columns of the result are cut off.
    """

    def __init__(
        self,
        config: MLATransformerConfig,
        *args: Any,
        k_channels: Any = None,
        v_channels: Any = None,
        **kwargs: Any,
    ) -> None:
        del k_channels, v_channels  # the configuration has them, before Megatron gives them too
        super().__init__(config, *args, **kwargs)
        self._value_width = config.v_head_dim
        self._width = max(config.qk_head_dim + config.qk_pos_emb_head_dim, config.v_head_dim)
        self.hidden_size_per_partition = self.num_attention_heads_per_partition * self._width

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Queries and keys (S, B, H, D), values (S, B, H, Dv), to (S, B, H * Dv) in their dtype."""
        filled = (torch.nn.functional.pad(x, (0, self._width - x.shape[-1])) for x in (query, key, value))
        out: torch.Tensor = super().forward(*filled, *args, **kwargs)
        return out.unflatten(-1, (-1, self._width))[..., : self._value_width].flatten(-2)
