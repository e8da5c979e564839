"""What a checkpoint and a run must have in common for the run to use the checkpoint's parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from megatron_lightseq.config import PretrainConfig
from megatron_lightseq.config.sections_experts import ExpertsConfig
from megatron_lightseq.config.sections_linear import LinearConfig
from megatron_lightseq.config.sections_model import ModelConfig
from megatron_lightseq.config.sections_rope import RopeConfig
from megatron_lightseq.config.sections_tuning import TuningConfig
from megatron_lightseq.training.setup import Training

ROTARY_KEYS = (
    "position_embedding_type",
    "rotary_base",
    "rotary_percent",
    *(key.name for key in fields(RopeConfig) if key.name not in ("rotary_interleaved", "no_rope_freq")),
)
"""RoPE's parameters, which may change when a run starts from the weights only (context extension)."""
ADAPTER_KEYS = ("lora_dim", "lora_alpha", "lora_target_modules")
"""Keys of adapters, which a run that starts from the weights only may add."""


def model_identity(config: PretrainConfig, padded_vocab_size: int) -> dict[str, Any]:
    """What two runs must share for one to use the other's weights."""
    model = config.model
    identity: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.query_groups,
        "kv_channels": model.head_dim,
        "padded_vocab_size": padded_vocab_size,
    }
    keys = (
        "position_embedding_type",
        "rotary_base",
        "rotary_percent",
        "normalization",
        "norm_epsilon",
        "swiglu",
        "untie_embeddings_and_output_weights",
        "add_bias_linear",
        "qk_layernorm",
    )
    identity.update({key: getattr(model, key) for key in keys})
    if model.position_embedding_type == "learned_absolute":
        identity["max_position_embeddings"] = model.max_position_embeddings or config.training.seq_length
    identity.update(_variants(config))
    return identity


def _variants(config: PretrainConfig) -> dict[str, Any]:
    """What a plain decoder does not have, left out where a model does not have it either."""
    model, experts = config.model, config.experts
    found = _unusual(config.rope, RopeConfig(), tuple(key.name for key in fields(RopeConfig)))
    found |= _unusual(model, ModelConfig(), _FUNCTION_KEYS)
    found |= adapter_identity(config)
    if model.multi_latent_attention:
        keys = ("multi_latent_attention", "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim")
        found.update({key: getattr(model, key) for key in (*keys, "v_head_dim")})
    if model.mtp_num_layers is not None:
        found["mtp_num_layers"] = model.mtp_num_layers
    if experts.num_experts is not None:
        found |= {"num_experts": experts.num_experts, "moe_ffn_hidden_size": config.expert_ffn_size}
        found |= _unusual(experts, ExpertsConfig(), _ROUTING_KEYS)
        routed = ("moe_router_topk", "moe_shared_expert_intermediate_size", "moe_grouped_gemm")
        found.update({key: getattr(experts, key) for key in routed})
    found |= _unusual(config.linear, LinearConfig(), ("linear_plain_output_norm",))
    return found


def _unusual(section: Any, default: Any, keys: tuple[str, ...]) -> dict[str, Any]:
    """The keys of a section whose values are not the defaults, as a checkpoint's manifest stores them."""
    values = {key: getattr(section, key) for key in keys if getattr(section, key) != getattr(default, key)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


_FUNCTION_KEYS = (
    "softmax_type",
    "apply_layernorm_1p",
    "post_self_attn_layernorm",
    "post_mlp_layernorm",
    "squared_relu",
    "quick_geglu",
    "gated_linear_unit",
    "activation_func",
    "glu_linear_offset",
    "activation_func_clamp_value",
    "add_qkv_bias",
    "qk_l2_norm",
    "softmax_scale",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "attention_output_gate",
    "embedding_multiplier",
)
_ROUTING_KEYS = (
    "moe_layer_freq",
    "moe_router_score_function",
    "moe_router_pre_softmax",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk_scaling_factor",
    "moe_router_enable_expert_bias",
    "moe_apply_probs_on_input",
    "moe_shared_expert_gate",
)


def attention_identity(config: PretrainConfig) -> dict[str, Any]:
    """What changes the model's function but not its weights, and may change between runs: what a query sees."""
    model = config.model
    extras = ("attention_chunk_size", "attn_temperature_tuning", "attn_scale", "floor_scale")
    found: dict[str, Any] = {"window_size": None, "window_attn_skip_freq": None}
    if model.window_size:
        freq = model.window_attn_skip_freq
        found["window_size"] = list(model.window_size)
        found["window_attn_skip_freq"] = list(freq) if isinstance(freq, tuple) else freq
    return {**found, **dict.fromkeys(extras), **_unusual(model, ModelConfig(), extras)}


def adapter_identity(config: PretrainConfig) -> dict[str, Any]:
    """What two runs must share for one to use the other's adapters; empty without adapters."""
    tuning = config.tuning
    if tuning.lora_dim is None:
        return {}
    values = {key: getattr(tuning, key) for key in ADAPTER_KEYS}
    return {**values, "lora_target_modules": sorted(tuning.lora_target_modules)}


def optimizer_identity(config: PretrainConfig) -> dict[str, Any]:
    """What two runs must share for one to use the other's optimizer state."""
    return {
        **_unusual(config.tuning, TuningConfig(), ("frozen_parameters",)),
        "optimizer": config.optimizer.optimizer,
        "use_distributed_optimizer": config.parallel.use_distributed_optimizer,
        "bf16": config.training.bf16,
    }


def data_identity(config: PretrainConfig) -> dict[str, Any]:
    """What two runs must share for one to continue reading where the other stopped."""
    training = config.training
    return {
        "seed": training.seed,
        "seq_length": training.seq_length,
        "split": config.data.split,
        "train_iters * global_batch_size": training.train_iters * training.global_batch_size,
    }


def world_identity(training: Training) -> dict[str, int]:
    """What two runs must share for one to use the other's random state."""
    sizes, parallel = training.sizes, training.config.parallel
    experts = {
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_size,
    }
    return {
        "world_size": sizes.world_size,
        "tensor_model_parallel_size": sizes.tensor,
        "pipeline_model_parallel_size": sizes.pipeline,
        "context_parallel_size": sizes.context,
        **(experts if training.config.experts.num_experts is not None else {}),
    }


def differing(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """The keys whose values differ, in alphabetical order; a missing key counts as None."""
    return [key for key in sorted({*saved, *own}) if saved.get(key) != own.get(key)]


def differences(saved: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Every differing key with both values, in words; empty if there is none."""
    return ", ".join(
        f"{key} is {saved.get(key)} in the checkpoint and {own.get(key)} here"
        for key in differing(saved, own)
    )
