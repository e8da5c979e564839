"""The SDPA baseline is correct, also with grouped queries, and never stores a score matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

from megatron_lightseq.config import ModelConfig
from megatron_lightseq.errors import UnsupportedError
from megatron_lightseq.megatron.seeded_init import WeightNames
from megatron_lightseq.tools.compare.padding import PaddedWeightNames
from megatron_lightseq.tools.compare.sdpa import SdpaCoreAttention

S, B, D = 75, 2, 16
_SMALL = {"num_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "attention_dropout": 0.0}


def attention(
    forwards: list[int], mask: AttnMaskType = AttnMaskType.causal, **config: Any
) -> SdpaCoreAttention:
    made = TransformerConfig(**_SMALL | config)
    return SdpaCoreAttention(made, 1, mask, "self", on_forward=lambda: forwards.append(1))


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention by its definition, in fp64, from (S, B, H or G, D)."""
    share = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(share, dim=2) for x in (k, v))
    scores = torch.einsum("sbhd,tbhd->bhst", q, k) * q.shape[-1] ** -0.5
    hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(1)
    probabilities = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("bhst,tbhd->sbhd", probabilities, v).reshape(*q.shape[:2], -1)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1), (6, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_definition(heads: int, groups: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    inputs = [torch.randn(S, B, n, D).to(dtype).requires_grad_() for n in (heads, groups, groups)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    forwards: list[int] = []
    out = attention(forwards)(*inputs)
    weight = torch.randn(out.shape)
    expected = reference(*wide)
    (out.float() * weight).sum().backward()
    (expected * weight).sum().backward()
    tolerance = {"atol": 2e-5, "rtol": 2e-5} if dtype == torch.float32 else {"atol": 5e-2, "rtol": 5e-2}
    torch.testing.assert_close(out.double(), expected, **tolerance)
    for narrow, exact in zip(inputs, wide, strict=True):
        torch.testing.assert_close(narrow.grad.double(), exact.grad, **tolerance)
    assert forwards == [1]


def test_holds_no_score_matrix() -> None:
    """One score matrix of 2048 tokens and 4 heads is 64 MiB; the fused kernel works in a few MiB."""
    from megatron_lightseq.tools.memory import peak_tensor_bytes

    q, k, v = (torch.randn(2048, 1, 4, D) for _ in range(3))
    module = attention([])
    assert peak_tensor_bytes(lambda: module(q, k, v)) < 16 << 20


@pytest.mark.parametrize(
    ("what", "mask", "config"),
    [
        ("attn_mask_type no_mask", AttnMaskType.no_mask, {}),
        ("attention_dropout 0.1", AttnMaskType.causal, {"attention_dropout": 0.1}),
        ("context_parallel_size 2", AttnMaskType.causal, {"context_parallel_size": 2}),
    ],
)
def test_refuses_what_it_would_ignore(what: str, mask: AttnMaskType, config: dict[str, Any]) -> None:
    with pytest.raises(
        UnsupportedError, match=f"{what}: the SDPA baseline only computes causal self-attention"
    ):
        attention([], mask, **config)


def test_refuses_packing() -> None:
    x = torch.randn(4, 1, 4, D)
    with pytest.raises(UnsupportedError, match="the argument packed_seq_params"):
        attention([])(x, x, x, packed_seq_params=object())


def test_padded_weights_are_the_models_own_and_zeros() -> None:
    model = ModelConfig(hidden_size=12, num_attention_heads=3, num_query_groups=3, kv_channels=4)
    plain, padded = WeightNames(5), PaddedWeightNames(seed=5, model=model)
    for names in (plain, padded):
        names.layer = 1
    rows = (3 + 2 * 3) * 4
    qkv = plain.normal("weight", 0.1)(torch.empty(rows, 12))
    wide = padded.normal("weight", 0.1)(torch.empty((4 + 2 * 4) * 4, 12))
    torch.testing.assert_close(wide[:rows], qkv, rtol=0, atol=0)
    assert not wide[rows:].any()
    projection = plain.normal("residual", 0.1)(torch.empty(12, 12))
    wide = padded.normal("residual", 0.1)(torch.empty(12, 16))
    torch.testing.assert_close(wide[:, :12], projection, rtol=0, atol=0)
    assert not wide[:, 12:].any()
    mlp = plain.normal("weight", 0.1)(torch.empty(8, 12))
    torch.testing.assert_close(padded.normal("weight", 0.1)(torch.empty(8, 12)), mlp, rtol=0, atol=0)
