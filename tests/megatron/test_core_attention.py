"""LightSeqCoreAttention replaces Megatron's: same results, and options that it would ignore are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_lightseq.errors import ConfigError, LayoutError, UnsupportedError

pytestmark = pytest.mark.usefixtures("one_rank")


def transformer_config(**overrides: Any) -> Any:
    from megatron.core.transformer import TransformerConfig

    options = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "attention_dropout": 0.0}
    return TransformerConfig(**{**options, "masked_softmax_fusion": False, **overrides})


def build(config: Any, layer_number: int = 1, **options: Any) -> Any:
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_lightseq.megatron import LightSeqCoreAttention

    options = {"attn_mask_type": AttnMaskType.causal, "attention_type": "self", **options}
    return LightSeqCoreAttention(config, layer_number, **options)


def megatrons(config: Any, layer_number: int = 1, **options: Any) -> Any:
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    options = {"attn_mask_type": AttnMaskType.causal, "attention_type": "self", **options}
    return DotProductAttention(config, layer_number, **options)


def qkv(num_query_groups: int = 4, length: int = 13) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(length, 2, heads, 8) for heads in (4, num_query_groups, num_query_groups)]
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def output_and_gradients(attention: Any, inputs: list[torch.Tensor], **call: Any) -> list[torch.Tensor]:
    out = attention(*inputs, None, **call)
    gradients = torch.autograd.grad((out * torch.arange(out.shape[-1])).sum(), inputs)
    return [out.detach(), *gradients]


EQUIVALENT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "multi-head": ({}, {}),
    "grouped": ({"num_query_groups": 2}, {}),
    "multi-query": ({"num_query_groups": 1}, {}),
    "softmax-scale": ({}, {"softmax_scale": 0.07}),
    "query-key-layer-scaling": ({"apply_query_key_layer_scaling": True}, {"layer_number": 2}),
    "window": ({"window_size": (4, 0)}, {}),
    "window-skipped-layer": ({"window_size": (4, 0), "window_attn_skip_freq": 2}, {"layer_number": 2}),
    "off-by-one": ({"softmax_type": "off-by-one"}, {}),
    "off-by-one, grouped, window": (
        {"softmax_type": "off-by-one", "num_query_groups": 2, "window_size": (4, 0)},
        {},
    ),
    "softmax-scale of the configuration": (
        {"softmax_scale": 0.2},
        {"softmax_scale": 0.2},
    ),  # SelfAttention passes it on
    "window-kept-layer": ({"window_size": (4, 0), "window_attn_skip_freq": 2}, {"layer_number": 1}),
}


@pytest.mark.parametrize("case", EQUIVALENT)
def test_equals_megatrons_attention(case: str) -> None:
    settings, options = EQUIVALENT[case]
    config = transformer_config(**settings)
    inputs = qkv(config.num_query_groups)
    ours, theirs = (output_and_gradients(make(config, **options), inputs) for make in (build, megatrons))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_learned_sinks_are_megatrons() -> None:
    config = transformer_config(softmax_type="learnable", num_query_groups=2, init_method_std=1.0)
    ours, theirs = build(config), megatrons(config)
    assert [name for name, _ in ours.named_parameters()] == ["softmax_offset"]
    assert ours.softmax_offset.tensor_model_parallel
    theirs.load_state_dict(ours.state_dict())
    inputs, found = qkv(2), []
    for attention in (ours, theirs):
        out = attention(*inputs, None)
        gradients = torch.autograd.grad(
            (out * torch.arange(out.shape[-1])).sum(), [*inputs, attention.softmax_offset]
        )
        found.append([out.detach(), *gradients])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert found[0][-1].norm() > 0.1
    (saved,) = ours.sharded_state_dict("attention.").values()
    assert (saved.key, saved.global_shape) == ("attention.softmax_offset", (4,))


def test_windows_and_layers_do_change_the_result() -> None:
    """Shows that the comparison above distinguishes masks and scales."""
    plain = output_and_gradients(build(transformer_config()), qkv())
    for settings, options in ({"window_size": (4, 0)}, {}), ({}, {"softmax_scale": 0.07}):
        other = output_and_gradients(build(transformer_config(**settings), **options), qkv())
        assert not torch.allclose(plain[0], other[0], atol=1e-3)


def test_mask_type_may_change_by_call() -> None:
    from megatron.core.transformer.enums import AttnMaskType

    attention = build(transformer_config())
    q, k, v = qkv()
    full = output_and_gradients(attention, [q, k, v], attn_mask_type=AttnMaskType.no_mask)
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.permute(1, 2, 0, 3) for x in (q, k, v)))
    torch.testing.assert_close(full[0], expected.permute(2, 0, 1, 3).flatten(2), rtol=1e-5, atol=1e-5)
    with pytest.raises(
        UnsupportedError, match=r"attn_mask_type padding: .* causal and no_mask.*Use one of the two"
    ):
        attention(q, k, v, None, attn_mask_type=AttnMaskType.padding)


def test_values_may_have_their_own_head_dim() -> None:
    """Latent attention: keys and values differ in width."""
    q, k, _ = qkv()
    v = torch.randn(13, 2, 4, 5)
    assert build(transformer_config(), k_channels=8, v_channels=5)(q, k, v, None).shape == (13, 2, 20)


def test_has_no_state() -> None:
    attention = build(transformer_config())
    assert attention.state_dict() == {}
    assert attention.sharded_state_dict("prefix.") == {}
    assert "lightseq on contiguous(1)" in repr(attention)


def test_megatrons_names_of_methods_are_understood() -> None:
    from megatron_lightseq.megatron.core_attention import CoreAttentionSettings

    def method(
        comm_type: Any, settings: CoreAttentionSettings | None = None, layer: int = 1, **config: Any
    ) -> str:
        attention = build(
            transformer_config(**config),
            layer,
            cp_comm_type=comm_type,
            settings=settings or CoreAttentionSettings(),
        )
        name: str = attention.method
        return name

    kinds = {
        None: "lightseq",
        "p2p": "lightseq",
        "all_gather": "all_gather",
        "a2a": "ulysses",
        "a2a+p2p": "usp",
    }
    assert {kind: method(kind) for kind in kinds} == kinds
    assert method("a2a+p2p", CoreAttentionSettings(ulysses_size=4)) == "usp:4"
    by_layer = CoreAttentionSettings(comm_types=("a2a", "p2p"))
    assert [method(None, by_layer, layer) for layer in (1, 2)] == ["ulysses", "lightseq"]
    assert method(None, CoreAttentionSettings(comm_types=("all_gather",)), 2) == "all_gather"
    # megatron-core 0.16.1 gives layer 1 the entry of layer 2
    assert method("p2p", layer=1, cp_comm_type=["a2a", "p2p"]) == "ulysses"
    with pytest.raises(
        UnsupportedError, match=r"cp_comm_type 'broadcast': the types are p2p.* set cp_method"
    ):
        method("broadcast")


def test_megatron_014_passes_its_groups_by_another_name() -> None:
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
    assert build(transformer_config(), model_comm_pgs=groups).group is groups.cp
    assert build(transformer_config(), pg_collection=groups).group is groups.cp


CONSTRUCTION = {
    "attention_dropout = 0.1": ({"attention_dropout": 0.1}, {}),
    "attention_dropout = 0.2": ({}, {"attention_dropout": 0.2}),
    "qk_clip = True": ({"qk_clip": True}, {}),
    "log_max_attention_logit = True": ({"log_max_attention_logit": True}, {}),
    "fp8_dot_product_attention": ({"fp8_dot_product_attention": True}, {}),
    "flash_decode = True": ({"flash_decode": True}, {}),
    "attention_type = 'cross'": ({}, {"attention_type": "cross"}),
    "num_splits = 4": ({}, {"num_splits": 4}),
    "the constructor argument sliding_sinks = 4": ({}, {"sliding_sinks": 4}),
}


@pytest.mark.parametrize("name", CONSTRUCTION)
def test_refuses_at_construction(name: str) -> None:
    settings, options = CONSTRUCTION[name]
    with pytest.raises(UnsupportedError, match=f"{name}.*: LightSeq attention refuses it, because "):
        build(transformer_config(**settings), **options)


def test_accepts_options_that_change_nothing() -> None:
    build(transformer_config(), attention_dropout=0.0, cp_comm_type="p2p", num_splits=None)
    build(
        transformer_config(attention_dropout=0.1), attention_dropout=0.0
    )  # the argument takes precedence, as in Megatron's attention


@pytest.mark.parametrize("name", ["attention_bias", "something_new"])
def test_refuses_at_call(name: str) -> None:
    with pytest.raises(
        UnsupportedError, match=f"the forward argument {name} = Tensor: LightSeq attention refuses it"
    ):
        build(transformer_config())(*qkv(), None, **{name: torch.zeros(1)})


def test_packed_sequences_are_documents() -> None:
    """In Megatron's form, (tokens, heads, head dim), with padding behind the first document."""
    from megatron.core.packed_seq_params import PackedSeqParams

    q, k, v = (x[:, 0].detach() for x in qkv())
    lengths, borders = (torch.tensor(found, dtype=torch.int32) for found in ((0, 4, 11), (0, 6, 13)))
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=lengths,
        cu_seqlens_kv=lengths,
        cu_seqlens_q_padded=borders,
        cu_seqlens_kv_padded=borders,
    )
    attention = build(transformer_config())
    out = attention(q, k, v, None, packed_seq_params=packed)
    assert out.shape == (13, 32), (
        "as Transformer Engine returns it: Megatron cuts padding off values by this shape"
    )
    for first, last in ((0, 4), (6, 13)):
        alone = attention(*(x[first:last, None] for x in (q, k, v)), None)
        torch.testing.assert_close(out[first:last], alone[:, 0], rtol=1e-5, atol=1e-6)
    assert not out[4:6].any()
    with pytest.raises(ConfigError, match=r"borders that end at 13, for 12 tokens"):
        attention(q[:12], k[:12], v[:12], None, packed_seq_params=packed)
    with pytest.raises(UnsupportedError, match=r"packed_seq_params together with an attention_mask"):
        attention(q, k, v, torch.zeros(1, 1, 13, 13, dtype=torch.bool), packed_seq_params=packed)


def test_group_and_configuration_must_have_one_size() -> None:
    config = transformer_config()
    config.context_parallel_size = 2
    with pytest.raises(ConfigError, match=r"context_parallel_size 2 with a group of 1 ranks: .*Initialise"):
        build(config)


def test_refuses_to_run_in_a_model_that_was_not_told_the_layout() -> None:
    from megatron_lightseq.layout import SequenceLayout

    attention = build(transformer_config())
    attention.layout = SequenceLayout.contiguous(2)
    with pytest.raises(
        LayoutError, match=r"contiguous\(2\) in a model that has not adopted it.*future tokens.*adopt_layout"
    ):
        attention(*qkv(), None)
