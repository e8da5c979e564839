"""Latent attention with Megatron's own layers: what the baseline computes, and what tensor parallelism adds up."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def latent_config(**overrides: Any) -> Any:
    from megatron.core.transformer import MLATransformerConfig

    options = {
        "num_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "multi_latent_attention": True,
        "q_lora_rank": 8,
        "kv_lora_rank": 12,
        "qk_head_dim": 8,
        "qk_pos_emb_head_dim": 4,
        "v_head_dim": 10,
        "rope_type": "rope",
        "rotary_scaling_factor": 1.0,
        "apply_rope_fusion": False,
        "attention_dropout": 0.0,
        "masked_softmax_fusion": False,
    }
    return MLATransformerConfig(**{**options, **overrides})


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("value_dim", [10, 12, 15])
def test_megatrons_attention_takes_values_of_any_width(value_dim: int) -> None:
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_lightseq.megatron.latent import LatentDotProductAttention

    config = latent_config(v_head_dim=value_dim)
    attention = LatentDotProductAttention(
        config, 1, AttnMaskType.causal, "self", softmax_scale=0.3, k_channels=12, v_channels=value_dim
    )
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(7, 2, 2, 12, generator=generator) for _ in range(2))
    value = torch.randn(7, 2, 2, value_dim, generator=generator)
    scores = torch.einsum("sbhd,tbhd->bhst", query, key) * 0.3
    future = torch.ones(7, 7, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    expected = torch.einsum("bhst,tbhd->sbhd", weights, value).flatten(-2)
    torch.testing.assert_close(attention(query, key, value, None), expected, rtol=1e-5, atol=1e-6)
