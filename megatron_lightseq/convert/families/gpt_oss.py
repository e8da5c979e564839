"""gpt-oss: sinks, biases everywhere, clamped quick GELU, all experts of a layer in one tensor."""

from __future__ import annotations

from megatron_lightseq.config import PretrainConfig
from megatron_lightseq.convert.families.experts import load_balancing_keys
from megatron_lightseq.convert.families.family import Family, Keys, Names, Rule
from megatron_lightseq.convert.families.parts import (
    LAYER,
    THEIR_LAYER,
    alternating_windows,
    attention_names,
    decoder_keys,
    embedding_names,
    in_layer,
    norm_names,
)
from megatron_lightseq.convert.families.rope import parameters_to_keys, rope_keys
from megatron_lightseq.convert.fields import Fields
from megatron_lightseq.convert.forms import SAME, Alternating, Form, Transposed

_THETA = 150000.0
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""RoPE where the file does not say it."""


def _keys(fields: Fields) -> Keys:
    fields.expect("attention_bias", True)
    fields.expect("hidden_act", "silu")
    fields.expect("swiglu_alpha", 1.702)
    topk = fields.whole("num_experts_per_tok", 4)
    fields.expect("experts_per_token", topk, topk)
    keys = decoder_keys(fields, groups=8, head_dim=64) | _rope(fields) | alternating_windows(fields, 128)
    original = keys.get("yarn_original_max_position_embeddings")
    fields.expect("initial_context_length", original, original)
    return (
        keys
        | load_balancing_keys(fields)
        | {
            "norm_epsilon": fields.real("rms_norm_eps", 1e-5),
            "add_bias_linear": True,
            "swiglu": False,
            "quick_geglu": True,
            "glu_linear_offset": 1.0,
            "activation_func_clamp_value": fields.real("swiglu_limit", 7.0),
            "softmax_type": "learnable",
            "num_experts": fields.whole("num_local_experts", 128),
            "moe_ffn_hidden_size": fields.whole("intermediate_size"),
            "moe_router_topk": topk,
        }
    )


def _rope(fields: Fields) -> Keys:
    if "rope_parameters" in fields or "rope_scaling" in fields:
        return rope_keys(fields, theta=_THETA)
    base = fields.real("rope_theta", _THETA)
    return parameters_to_keys(Fields(_YARN, fields.origin), fields, base)


def _names(config: PretrainConfig) -> Names:
    sinks = in_layer(self_attention__core_attention__softmax_offset="self_attn.sinks")
    router = in_layer(mlp__router__weight="mlp.router.weight", mlp__router__bias="mlp.router.bias")
    experts = {
        "linear_fc1.weight": _all_experts("gate_up_proj", Alternating()),
        "linear_fc1.bias": _all_experts("gate_up_proj_bias", Alternating()),
        "linear_fc2.weight": _all_experts("down_proj", Transposed()),
        "linear_fc2.bias": _all_experts("down_proj_bias", SAME),
    }
    prefix = LAYER + "mlp.experts.local_experts.{expert}."
    return {
        **embedding_names(),
        **attention_names(config),
        **norm_names(),
        **sinks,
        **router,
        **{prefix + name: rule for name, rule in experts.items()},
    }


def _all_experts(name: str, form: Form) -> Rule:
    return Rule((f"{THEIR_LAYER}mlp.experts.{name}",), form, per_expert=True)


GPT_OSS = {"gpt_oss": Family(_keys, _names)}
