"""GLM-4, dense and with experts: RoPE on half of each head."""

from __future__ import annotations

from megatron_lightseq.config import PretrainConfig
from megatron_lightseq.convert.families.family import NEXT_LAYER, Family, Keys, Names
from megatron_lightseq.convert.families.parts import (
    attention_names,
    decoder_keys,
    embedding_names,
    expect_silu,
    expert_bias_names,
    expert_names,
    fused_mlp_names,
    in_layer,
    llama_names,
    norm_names,
    shared_expert_names,
)
from megatron_lightseq.convert.families.rope import rope_keys
from megatron_lightseq.convert.families.routing import sigmoid_routing_keys
from megatron_lightseq.convert.fields import Fields


def _glm4(fields: Fields) -> Keys:
    keys = decoder_keys(fields, groups=2, head_dim=128) | expect_silu(fields) | rope_keys(fields, partial=0.5)
    return keys | {
        "norm_epsilon": fields.real("rms_norm_eps", 1.5625e-07),
        "rotary_interleaved": True,
        "add_qkv_bias": fields.flag("attention_bias", True),
        "post_self_attn_layernorm": True,
        "post_mlp_layernorm": True,
    }


def _glm4_names(config: PretrainConfig) -> Names:
    after = in_layer(
        post_self_attn_layernorm__weight="post_self_attn_layernorm.weight",
        post_mlp_layernorm__weight="post_mlp_layernorm.weight",
    )
    return {**embedding_names(), **attention_names(config), **norm_names(), **fused_mlp_names(), **after}


def _glm4_moe(fields: Fields) -> Keys:
    keys = decoder_keys(fields, groups=8) | expect_silu(fields) | rope_keys(fields, partial=0.5)
    return (
        keys
        | sigmoid_routing_keys(fields, experts=128, topk=8, groups=1, topk_groups=1, scaling=1.0, dense=1)
        | {
            "norm_epsilon": fields.real("rms_norm_eps", 1e-5),
            "add_qkv_bias": fields.flag("attention_bias", False),
            "qk_layernorm": fields.flag("use_qk_norm", False),
        }
    )


def _glm4_moe_names(config: PretrainConfig) -> Names:
    return {**llama_names(config), **expert_names(), **expert_bias_names(), **shared_expert_names()}


GLM = {
    "glm4": Family(_glm4, _glm4_names),
    "glm4_moe": Family(_glm4_moe, _glm4_moe_names, left_out=NEXT_LAYER),
}
