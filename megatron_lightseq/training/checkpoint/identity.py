"""What a checkpoint and a run must have in common for the run to use the checkpoint's parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_lightseq.config import PretrainConfig
from megatron_lightseq.training.setup import Training

ROTARY_KEYS = ("rotary_base", "rotary_percent")
"""RoPE's parameters, which may change when a run starts from the weights only (context extension)."""


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
        *ROTARY_KEYS,
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
    found: dict[str, Any] = {}
    if model.softmax_type != "vanilla":
        found["softmax_type"] = model.softmax_type
    if model.multi_latent_attention:
        keys = ("multi_latent_attention", "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim")
        found.update({key: getattr(model, key) for key in (*keys, "v_head_dim")})
    if model.mtp_num_layers is not None:
        found["mtp_num_layers"] = model.mtp_num_layers
    if experts.num_experts is not None:
        found |= {"num_experts": experts.num_experts, "moe_ffn_hidden_size": config.expert_ffn_size}
        routed = ("moe_router_topk", "moe_shared_expert_intermediate_size", "moe_grouped_gemm")
        found.update({key: getattr(experts, key) for key in routed})
    return found


def attention_identity(config: PretrainConfig) -> dict[str, Any]:
    """What changes the model's function without touching its weights, and may change between runs: the window."""
    model = config.model
    if not model.window_size:
        return {"window_size": None, "window_attn_skip_freq": None}
    return {
        "window_size": list(model.window_size),
        "window_attn_skip_freq": model.window_attn_skip_freq,
    }


def optimizer_identity(config: PretrainConfig) -> dict[str, Any]:
    """What two runs must share for one to use the other's optimizer state."""
    return {
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
