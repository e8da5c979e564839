"""Gemma 2 and 3 (text): zero-centred norms before and after, GeGLU, scaled embeddings, windows in most layers."""

from __future__ import annotations

from megatron_lightseq.config import PretrainConfig
from megatron_lightseq.convert.families.family import Family, Keys, Names
from megatron_lightseq.convert.families.parts import (
    alternating_windows,
    attention_names,
    decoder_keys,
    embedding_names,
    in_layer,
    mlp_names,
)
from megatron_lightseq.convert.families.rope import parameters_to_keys, rope_keys
from megatron_lightseq.convert.fields import Fields


def _shared(fields: Fields) -> Keys:
    fields.expect("attention_bias", False)
    fields.expect("use_bidirectional_attention", False)
    for name in ("hidden_activation", "hidden_act"):
        fields.expect(name, "gelu_pytorch_tanh")
    keys = decoder_keys(fields, tied=True, groups=4, head_dim=256)
    return keys | {
        "swiglu": False,
        "gated_linear_unit": True,
        "activation_func": "gelu_tanh",
        "apply_layernorm_1p": True,
        "post_self_attn_layernorm": True,
        "post_mlp_layernorm": True,
        "embedding_multiplier": keys["hidden_size"] ** 0.5,
        "query_pre_attn_scalar": fields.real("query_pre_attn_scalar", 256),
    }


def _softcaps(fields: Fields, attention: float | None, final: float | None) -> Keys:
    return {
        "attn_logit_softcapping": fields.given("attn_logit_softcapping", attention),
        "final_logit_softcapping": fields.given("final_logit_softcapping", final),
    }


def _gemma2(fields: Fields) -> Keys:
    return (
        _shared(fields)
        | _softcaps(fields, 50.0, 30.0)
        | rope_keys(fields)
        | alternating_windows(fields, 4096)
    )


def _gemma3(fields: Fields) -> Keys:
    every = fields.whole("sliding_window_pattern", fields.whole("_sliding_window_pattern", 6))
    keys = _shared(fields) | _softcaps(fields, None, None) | alternating_windows(fields, 4096, every)
    return keys | _two_ropes(fields) | {"qk_layernorm": True}


def _two_ropes(fields: Fields) -> Keys:
    """Layers with a window have a base of their own, and no scaling."""
    base, local = fields.real("rope_theta", 1e6), fields.real("rope_local_base_freq", 1e4)
    old, new = fields.part("rope_scaling", {}), fields.part("rope_parameters", {})
    whole, short = new.part("full_attention", {}), new.part("sliding_attention", {})
    new.finish()
    short.expect("rope_type", "default")
    local = short.real("rope_theta", local)
    short.finish()
    keys = parameters_to_keys(whole if "rope_parameters" in fields else old, fields, base)
    return keys | {"rotary_base_local": local}


def _names(config: PretrainConfig) -> Names:
    norms = in_layer(
        input_layernorm__weight="input_layernorm.weight",
        post_self_attn_layernorm__weight="post_attention_layernorm.weight",
        pre_mlp_layernorm__weight="pre_feedforward_layernorm.weight",
        post_mlp_layernorm__weight="post_feedforward_layernorm.weight",
    )
    return {**embedding_names(), **attention_names(config), **norms, **mlp_names()}


GEMMA = {"gemma2": Family(_gemma2, _names), "gemma3_text": Family(_gemma3, _names)}
