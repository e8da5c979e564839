"""Decoders with mixtures of experts and grouped-query attention."""

from __future__ import annotations

from megatron_lightseq.config import PretrainConfig
from megatron_lightseq.convert.families.family import Family, Keys, Names
from megatron_lightseq.convert.families.parts import (
    FULL,
    SLIDING,
    decoder_keys,
    expect_silu,
    expert_names,
    llama_names,
    qwen_window_keys,
    window_keys,
)
from megatron_lightseq.convert.families.rope import rope_keys
from megatron_lightseq.convert.fields import Fields


def load_balancing_keys(fields: Fields) -> Keys:
    """The auxiliary loss over the micro-batch."""
    coefficient = fields.real("router_aux_loss_coef", 0.001)
    return {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": coefficient}


def _mixtral(fields: Fields) -> Keys:
    keys = decoder_keys(fields, groups=8) | expect_silu(fields) | rope_keys(fields, theta=1e6)
    fields.expect("router_jitter_noise", 0.0)
    window = fields.take("sliding_window", None)
    kinds = [FULL if window is None else SLIDING] * keys["num_layers"]
    return (
        keys
        | window_keys(window, kinds, fields)
        | load_balancing_keys(fields)
        | {
            "num_experts": fields.whole("num_local_experts", 8),
            "moe_router_topk": fields.whole("num_experts_per_tok", 2),
        }
    )


def _mixtral_names(config: PretrainConfig) -> Names:
    return {**llama_names(config), **expert_names("block_sparse_moe.", ("w1", "w3", "w2"))}


def _qwen3_moe(fields: Fields) -> Keys:
    fields.expect("attention_bias", False)
    keys = decoder_keys(fields, groups=4, head_dim=128) | expect_silu(fields) | rope_keys(fields)
    experts = (
        fields.whole("num_experts", None) if "num_experts" in fields else fields.whole("num_local_experts")
    )
    keys |= qwen_window_keys(fields) | load_balancing_keys(fields)
    keys |= {
        "qk_layernorm": True,
        "num_experts": experts,
        "moe_ffn_hidden_size": fields.whole("moe_intermediate_size"),
        "moe_router_topk": fields.whole("num_experts_per_tok", 8),
    }
    keys |= sparse_layer_keys(fields, keys["num_layers"])
    if not fields.flag("norm_topk_prob", False):
        keys["moe_router_pre_softmax"] = True
    return keys


def sparse_layer_keys(fields: Fields, layers: int) -> Keys:
    """Which layers have experts: every n-th one, without those that the file lists."""
    step = fields.whole("decoder_sparse_step", 1)
    plain = {int(number) for number in fields.items("mlp_only_layers")}
    routed = [int(i not in plain and (i + 1) % step == 0) for i in range(layers)]
    return {} if all(routed) else {"moe_layer_freq": routed}


def _qwen3_moe_names(config: PretrainConfig) -> Names:
    return {**llama_names(config), **expert_names()}


EXPERTS = {
    "mixtral": Family(_mixtral, _mixtral_names),
    "qwen3_moe": Family(_qwen3_moe, _qwen3_moe_names),
}
