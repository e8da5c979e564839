"""Latent attention with Megatron's own layers: the baseline, and gradient sums under tensor parallelism."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.harness.recipes import LATENT
from tests.megatron.runs import on_ranks, train


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

    from megatron_lightseq.megatron.fixes.latent_attention import LatentDotProductAttention

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


def down_projection_gradient(adopted: bool) -> torch.Tensor:
    """This rank's rows of the gradient, from a GPTModel that another program builds over tensor-parallel ranks."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_lightseq.megatron import adopt_layout, gpt_layer_spec
    from megatron_lightseq.megatron.cpu import platform as cpu_platform

    cpu_platform.activate()
    parallel_state.initialize_model_parallel(dist.get_world_size(), create_gloo_process_groups=False)
    try:
        torch.manual_seed(1)
        model_parallel_cuda_manual_seed(1)
        config = latent_config(
            tensor_model_parallel_size=dist.get_world_size(),
            use_cpu_initialization=True,
            hidden_dropout=0.0,
            init_method_std=0.3,
        )
        model = GPTModel(config, gpt_layer_spec(config), 64, 16, position_embedding_type="rope")
        if adopted:
            for _ in range(2):  # the second pass must not sum the gradient twice
                adopt_layout(model)
        tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(2))
        positions = torch.arange(16).expand(2, 16)
        model(tokens, positions, None, labels=tokens.roll(-1, 1)).mean().backward()
        weight = model.decoder.layers[0].self_attention.linear_kv_down_proj.weight
        assert weight.grad is not None
        return weight.grad
    finally:
        parallel_state.destroy_model_parallel()


def test_shared_keys_sum_their_gradient_in_a_program_of_ones_own() -> None:
    whole = on_ranks(1, down_projection_gradient, True)[0]
    mended = torch.cat(on_ranks(2, down_projection_gradient, True))
    torch.testing.assert_close(mended, whole, rtol=1e-4, atol=1e-6)
    megatrons = torch.cat(on_ranks(2, down_projection_gradient, False))
    shared = slice(12, None)  # the columns after the latent vector
    assert (megatrons[shared] - whole[shared]).norm() > 0.05 * whole[shared].norm(), (
        "Megatron mends it itself"
    )


def test_recipes_with_megatrons_own_attention_sum_it_too() -> None:
    recipe = {**LATENT, "cp_method": "megatron", "train_iters": 2}
    whole, cut = (on_ranks(size, train, {**recipe, "tensor_model_parallel_size": size})[0] for size in (1, 2))
    torch.testing.assert_close(cut.grad_norms, whole.grad_norms, rtol=1e-4, atol=0.0)
