"""Qwen3-Next and the texts of Qwen3.5: gated delta nets, and every fourth layer softmax attention with an output gate.

The output norm of a delta net multiplies by its weight, all other norms by 1 + weight.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_lightseq.config import PretrainConfig
from megatron_lightseq.convert.families.experts import load_balancing_keys, sparse_layer_keys
from megatron_lightseq.convert.families.family import Family, Keys, Names, Rule
from megatron_lightseq.convert.families.parts import (
    FULL,
    LAYER,
    THEIR_LAYER,
    attention_names,
    decoder_keys,
    embedding_names,
    expect_silu,
    expert_names,
    in_layer,
    layer_kinds,
    mlp_names,
    norm_names,
)
from megatron_lightseq.convert.families.rope import OF_IMAGES, rope_keys
from megatron_lightseq.convert.fields import Fields
from megatron_lightseq.convert.forms import ByKeyHead, GatedByGroup, Sections

_LINEAR = "linear_attention"
_NEXT_TOKENS = "mtp."
"""Prefix of layers of multi-token prediction."""


# ---- recipe keys ----------------------------------------------------------------------------------------------


def _hybrid(fields: Fields, groups: int) -> Keys:
    """What all of them have; ``groups`` is the default number of key/value heads."""
    keys = decoder_keys(fields, groups=groups, head_dim=256) | expect_silu(fields)
    keys |= rope_keys(fields, partial=0.25, ignored=OF_IMAGES)
    return (
        keys
        | _linear(fields, keys["num_layers"])
        | {
            "apply_layernorm_1p": True,
            "qk_layernorm": True,
            "attention_output_gate": True,
            "add_qkv_bias": _without_bias(fields),
        }
    )


def _without_bias(fields: Fields) -> bool:
    """False: the output projection would have a bias, too, which recipes do not have on attention alone."""
    fields.expect("attention_bias", False)
    return False


def _linear(fields: Fields, layers: int) -> Keys:
    """The kinds of layers, and what linear ones are."""
    every = fields.whole("full_attention_interval", 4)
    usual = [_LINEAR if number % every else FULL for number in range(1, layers + 1)]
    kinds = layer_kinds(fields, usual)
    others = sorted(set(kinds) - {FULL, _LINEAR})
    if others:
        raise fields.refusal("layer_types", others, f"these models have {FULL} and {_LINEAR}")
    sizes = {
        "linear_conv_kernel_dim": fields.whole("linear_conv_kernel_dim", 4),
        "linear_key_head_dim": fields.whole("linear_key_head_dim", 128),
        "linear_value_head_dim": fields.whole("linear_value_head_dim", 128),
        "linear_num_key_heads": fields.whole("linear_num_key_heads", 16),
        "linear_num_value_heads": fields.whole("linear_num_value_heads", 32),
    }
    if _LINEAR not in kinds:
        return {}
    return {
        **sizes,
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": _frequency(kinds),
        "linear_plain_output_norm": True,
    }


def _frequency(kinds: list[str]) -> int | list[int]:
    """``n`` if all layers but every n-th are linear, else 0 or 1 for each layer."""
    full = [number for number, kind in enumerate(kinds, 1) if kind == FULL]
    if full and full[0] > 1 and full == list(range(full[0], len(kinds) + 1, full[0])):
        return full[0]
    return [int(kind == _LINEAR) for kind in kinds]


def _experts(fields: Fields, number: int, topk: int) -> Keys:
    """Routed experts and the gated shared one; ``number`` and ``topk`` are defaults."""
    return load_balancing_keys(fields) | {
        "num_experts": fields.whole("num_experts", number),
        "moe_ffn_hidden_size": fields.whole("moe_intermediate_size", 512),
        "moe_router_topk": fields.whole("num_experts_per_tok", topk),
        "moe_shared_expert_intermediate_size": fields.whole("shared_expert_intermediate_size", 512),
        "moe_shared_expert_gate": True,
    }


def _qwen3_next(fields: Fields) -> Keys:
    fields.expect("use_sliding_window", False)
    keys = _hybrid(fields, groups=2) | _experts(fields, 512, 10)
    keys |= sparse_layer_keys(fields, keys["num_layers"])
    if not fields.flag("norm_topk_prob", True):
        keys["moe_router_pre_softmax"] = True
    return keys


def _qwen3_5(fields: Fields) -> Keys:
    _skip_next_tokens(fields)
    return _hybrid(fields, groups=4)


def _skip_next_tokens(fields: Fields) -> None:
    for name in ("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"):
        fields.take(name, None)  # layers that transformers leaves out


# ---- names ----------------------------------------------------------------------------------------------------


def _attention_names(config: PretrainConfig) -> Names:
    model = config.model
    form = GatedByGroup(model.num_attention_heads, model.query_groups, model.head_dim)
    parts = tuple(f"{THEIR_LAYER}self_attn.{x}_proj.weight" for x in "qkv")
    qkv = Rule(parts, form)
    return {**attention_names(config), f"{LAYER}self_attention.linear_qkv.weight": qkv}


def _delta_net_names(projection: Rule) -> Names:
    return {
        f"{LAYER}self_attention.in_proj.weight": projection,
        **in_layer(
            self_attention__conv1d__weight="linear_attn.conv1d.weight",
            self_attention__dt_bias="linear_attn.dt_bias",
            self_attention__A_log="linear_attn.A_log",
            self_attention__out_norm__weight="linear_attn.norm.weight",
            self_attention__out_proj__weight="linear_attn.out_proj.weight",
        ),
    }


def _by_key_head(config: PretrainConfig) -> Rule:
    """Qwen3-Next: queries, keys, values and gates in one tensor, beta and alpha in another."""
    linear = config.linear
    values = linear.linear_num_value_heads // linear.linear_num_key_heads
    keys, wide = linear.linear_key_head_dim, values * linear.linear_value_head_dim
    form = ByKeyHead(linear.linear_num_key_heads, ((keys, keys, wide, wide), (values, values)))
    return Rule(tuple(f"{THEIR_LAYER}linear_attn.in_proj_{x}.weight" for x in ("qkvz", "ba")), form)


def _by_section(config: PretrainConfig) -> Rule:
    """Qwen3.5: queries, keys and values in one tensor, gates, beta and alpha in others."""
    linear = config.linear
    keys = linear.linear_num_key_heads * linear.linear_key_head_dim
    heads = linear.linear_num_value_heads
    values = heads * linear.linear_value_head_dim
    form = Sections((2 * keys + values, values, heads, heads))
    return Rule(tuple(f"{THEIR_LAYER}linear_attn.in_proj_{x}.weight" for x in ("qkv", "z", "b", "a")), form)


def _shared_expert_names() -> Names:
    gate = in_layer(mlp__shared_experts__gate_weight="mlp.shared_expert_gate.weight")
    return {**mlp_names("mlp.shared_experts.", "mlp.shared_expert."), **gate}


def _names_with(projection: Callable[[PretrainConfig], Rule]) -> Callable[[PretrainConfig], Names]:
    """The table of a family whose input projections are stored as ``projection`` says."""

    def names(config: PretrainConfig) -> Names:
        return {
            **embedding_names(),
            **_attention_names(config),
            **_delta_net_names(projection(config)),
            **norm_names(),
            **mlp_names(),
            **expert_names(),
            **_shared_expert_names(),
        }

    return names


QWEN_HYBRID = {
    "qwen3_next": Family(_qwen3_next, _names_with(_by_key_head), left_out=_NEXT_TOKENS),
    "qwen3_5_text": Family(_qwen3_5, _names_with(_by_section), left_out=_NEXT_TOKENS),
}
