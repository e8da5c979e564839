"""Megatron's layers with torch's fused attention: the baseline for users without Transformer Engine.

Megatron's own ``DotProductAttention`` stores the full score matrix. Long sequences are not trained that way in
practice, so comparing with it would be unfair. ``F.scaled_dot_product_attention`` stores only blocks, on CPUs and GPUs.

S = tokens, B = batch, H = query heads, G = key/value heads, D = head dim; all on one tensor-parallel rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from megatron_lightseq.attention import AttentionStats
from megatron_lightseq.config import PretrainConfig
from megatron_lightseq.errors import UnsupportedError, explain

FUSED_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
"""Not MATH: torch would silently fall back to it and store the score matrix."""


class SdpaCoreAttention(MegatronModule):
    """A ``core_attention`` that calls torch's fused kernel: causal self-attention without context parallelism.

    Raises:
        UnsupportedError: Another mask, dropout, packing or context parallelism is requested.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        *,
        on_forward: Callable[[], None],
        softmax_scale: float | None = None,
        **_options: Any,
    ) -> None:
        super().__init__(config=config)
        del layer_number
        self._on_forward = on_forward
        self._softmax_scale = softmax_scale
        refused = {
            f"attn_mask_type {attn_mask_type.name}": attn_mask_type is not AttnMaskType.causal,
            f"attention_type {attention_type}": attention_type != "self",
            f"attention_dropout {config.attention_dropout}": config.attention_dropout > 0,
            f"context_parallel_size {config.context_parallel_size}": config.context_parallel_size > 1,
        }
        for what, given in refused.items():
            if given:
                raise _refusal(what)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        **extras: Any,
    ) -> torch.Tensor:
        """Causal attention.

        Args:
            query: (S, B, H, D), key: (S, B, G, D), value: (S, B, G, D).
            attention_mask: Ignored; the mask is causal.
            attn_mask_type: None or causal.
            extras: Biases and packing; refused unless None.

        Returns:
            (S, B, H * D).
        """
        del attention_mask
        if attn_mask_type not in (None, AttnMaskType.causal):
            raise _refusal(f"attn_mask_type {attn_mask_type}")
        for name, given in extras.items():
            if given is not None:
                raise _refusal(f"the argument {name}")
        self._on_forward()
        share = query.shape[2] // key.shape[2]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # (B, H or G, S, D)
        if share > 1:  # repeated, because not all fused kernels support enable_gqa
            k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
        with sdpa_kernel(FUSED_BACKENDS):
            out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=self._softmax_scale)
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def sharded_state_dict(self, *_args: Any, **_options: Any) -> dict[str, Any]:
        """Empty: there are no parameters to save."""
        return {}


def sdpa_layer_spec(config: PretrainConfig, stats: AttentionStats) -> ModuleSpec:
    """Megatron's local layer with :class:`SdpaCoreAttention`; ``stats`` counts its forward passes."""
    spec = copy.deepcopy(
        get_gpt_layer_local_spec(
            normalization=config.model.normalization, qk_layernorm=config.model.qk_layernorm
        )
    )
    attention = spec.submodules.self_attention.submodules

    # A function, because Megatron deep-copies specifications, and would copy the counters.
    def count() -> None:
        stats.forwards += 1

    attention.core_attention = ModuleSpec(module=SdpaCoreAttention, params={"on_forward": count})
    return spec


def _refusal(what: str) -> UnsupportedError:
    return UnsupportedError(
        explain(
            got=what,
            rule="the SDPA baseline only computes causal self-attention of whole sequences",
            remedy="Use a system with LightSeq attention",
        )
    )
