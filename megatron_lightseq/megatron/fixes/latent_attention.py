"""Multi-latent attention (MLA) without Transformer Engine: two fixes for Megatron's local layers.

* All heads share the part of the keys that RoPE is applied to. Each tensor-parallel rank uses it for its own heads, so
  its gradient is a sum over ranks; but the backward of the gather before it (transformer/multi_latent_attention.py)
  returns to each rank only that rank's part of its own gradient. Layers from Transformer Engine do not use this gather.
* Values may have a smaller head dim than queries and keys, which ``DotProductAttention`` does not support.
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
    """The identity, with a gradient that is summed over a group.

    Megatron's version (``copy_to_tensor_model_parallel_region``) loses the sum if the gradient is not contiguous.
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
    """Megatron's ``gather_from_tensor_model_parallel_region`` for one attention, with the missing sum of gradients."""

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
        """(..., width / TP) to (..., width); the last columns of the keys' and values' latent are the shared keys."""
        whole: torch.Tensor = gather_from_tensor_model_parallel_region(part)
        if part is not self._latent:
            return whole
        self._latent = None
        latent, keys = whole.split(self._widths, dim=-1)
        return torch.cat([latent, _SumOfGradients.apply(keys, self._group)], dim=-1)


def sum_shared_keys(model: torch.nn.Module) -> int:
    """Make every latent attention below ``model`` sum the gradient of its shared keys over tensor-parallel ranks.

    Nothing changes on one such rank, where Megatron does not gather, and in a second call.

    Returns:
        The number of methods that call the gather.
    """
    found = 0
    for module in model.modules():
        if not isinstance(module, MLASelfAttention) or module.config.tensor_model_parallel_size == 1:
            continue
        if not hasattr(module, _FIXED):
            found += rebind(module, _GATHER, SharedKeyGather(module))
            setattr(module, _FIXED, True)
    return found


_GATHER, _FIXED = "gather_from_tensor_model_parallel_region", "sums_shared_keys"


class LatentDotProductAttention(DotProductAttention):
    """Megatron's attention for values with another head dim than queries: the narrower side is padded with zeros.

    Scores, mask, softmax and products are Megatron's, on one context-parallel rank. Zeros add nothing to a score, and
    their columns of the result are cut off.
    """

    def __init__(
        self,
        config: MLATransformerConfig,
        *args: Any,
        k_channels: Any = None,
        v_channels: Any = None,
        **kwargs: Any,
    ) -> None:
        del k_channels, v_channels  # also in the configuration, in every version
        super().__init__(config, *args, **kwargs)
        self._value_width = config.v_head_dim
        self._width = max(config.qk_head_dim + config.qk_pos_emb_head_dim, config.v_head_dim)
        self.hidden_size_per_partition = self.num_attention_heads_per_partition * self._width

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Queries and keys (S, B, H, D), values (S, B, H, Dv), to (S, B, H * Dv) in their dtype."""
        padded = (torch.nn.functional.pad(x, (0, self._width - x.shape[-1])) for x in (query, key, value))
        out: torch.Tensor = super().forward(*padded, *args, **kwargs)
        return out.unflatten(-1, (-1, self._width))[..., : self._value_width].flatten(-2)
