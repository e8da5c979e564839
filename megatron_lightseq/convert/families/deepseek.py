"""DeepSeek V2 and V3: latent attention, dense layers first, then many experts."""

from __future__ import annotations

from megatron_lightseq.config import PretrainConfig
from megatron_lightseq.convert.families.family import NEXT_LAYER, Family, Keys, Names
from megatron_lightseq.convert.families.parts import (
    decoder_keys,
    embedding_names,
    expect_silu,
    expert_bias_names,
    expert_names,
    in_layer,
    mlp_names,
    norm_names,
    shared_expert_names,
)
from megatron_lightseq.convert.families.rope import rope_keys
from megatron_lightseq.convert.families.routing import fine_grained_keys, group_keys, sigmoid_routing_keys
from megatron_lightseq.convert.fields import Fields

_LATENT_EPSILON = 1e-6
"""Of the norms of the latent vectors, whatever the model's is; in recipes it is the model's."""


def _latent_attention(fields: Fields) -> Keys:
    rotated, plain = fields.whole("qk_rope_head_dim", 64), fields.whole("qk_nope_head_dim", 128)
    heads = fields.whole("num_attention_heads")
    fields.expect("attention_bias", False)
    fields.expect("num_key_value_heads", heads, heads)
    fields.expect("head_dim", rotated, rotated)
    fields.expect("qk_head_dim", rotated + plain, rotated + plain)
    fields.expect("rms_norm_eps", _LATENT_EPSILON, _LATENT_EPSILON)
    keys = decoder_keys(fields) | expect_silu(fields) | rope_keys(fields, latent=True)
    del keys["num_query_groups"], keys["kv_channels"]
    return keys | {
        "multi_latent_attention": True,
        "q_lora_rank": fields.given("q_lora_rank", 1536),
        "kv_lora_rank": fields.whole("kv_lora_rank", 512),
        "qk_head_dim": plain,
        "qk_pos_emb_head_dim": rotated,
        "v_head_dim": fields.whole("v_head_dim", 128),
        "qk_layernorm": True,  # of the latent vectors
    }


def _deepseek_v3(fields: Fields) -> Keys:
    fields.expect("rope_interleave", True)
    return _latent_attention(fields) | sigmoid_routing_keys(
        fields, experts=256, topk=8, groups=8, topk_groups=4, scaling=2.5, dense=3
    )


def _deepseek_v2(fields: Fields) -> Keys:
    for name in ("mlp_bias", "norm_topk_prob"):
        fields.expect(name, False)
    fields.expect("scoring_func", "softmax")
    keys = _latent_attention(fields) | fine_grained_keys(fields, experts=64, topk=6, dense=0, shared=2)
    keys |= {
        "moe_router_pre_softmax": True,
        "moe_router_topk_scaling_factor": fields.real("routed_scaling_factor", 1.0),
    }
    method = fields.take("topk_method", "greedy")
    grouped = group_keys(fields, keys["moe_router_topk"], rated_by=1, groups=1, topk_groups=1)
    if method not in ("greedy", "group_limited_greedy"):
        raise fields.refusal("topk_method", method, "recipes have greedy and group_limited_greedy")
    return keys | (grouped if method == "group_limited_greedy" else {})


def _names(config: PretrainConfig) -> Names:
    latent = in_layer(
        self_attention__linear_q_proj__weight="self_attn.q_proj.weight",
        self_attention__linear_q_down_proj__weight="self_attn.q_a_proj.weight",
        self_attention__q_layernorm__weight="self_attn.q_a_layernorm.weight",
        self_attention__linear_q_up_proj__weight="self_attn.q_b_proj.weight",
        self_attention__linear_kv_down_proj__weight="self_attn.kv_a_proj_with_mqa.weight",
        self_attention__kv_layernorm__weight="self_attn.kv_a_layernorm.weight",
        self_attention__linear_kv_up_proj__weight="self_attn.kv_b_proj.weight",
        self_attention__linear_proj__weight="self_attn.o_proj.weight",
    )
    experts = {**expert_names(), **expert_bias_names(), **shared_expert_names()}
    return {**embedding_names(), **latent, **norm_names(), **mlp_names(), **experts}


DEEPSEEK = {
    "deepseek_v2": Family(_deepseek_v2, _names),
    "deepseek_v3": Family(_deepseek_v3, _names, left_out=NEXT_LAYER),
}
