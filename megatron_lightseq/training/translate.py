"""Translates this package's configuration into Megatron's own configurations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import MLATransformerConfig, TransformerConfig

from megatron_lightseq.config import PretrainConfig
from megatron_lightseq.config.layer_pattern import spelled_out
from megatron_lightseq.megatron.gated_delta_net import UNIFORM_INIT
from megatron_lightseq.megatron.seeded_init import WeightNames
from megatron_lightseq.training.model_parts import rope_attributes


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """As Megatron's, which is compiled when it is first called."""
    return x * torch.sigmoid(1.702 * x)


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """As Megatron's, which is compiled when it is first called."""
    return torch.nn.functional.relu(x).square()


ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "relu": torch.nn.functional.relu,
    "quick_gelu": quick_gelu,
    "squared_relu": squared_relu,
}
"""What the words of `activation_func` stand for."""
LATENT_ROPE = (
    "rotary_scaling_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)
"""Keys of YaRN with latent attention, which Megatron's MLATransformerConfig has too."""
DELTA_NET = (
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
)
"""Widths of gated delta nets, which Megatron's TransformerConfig has under the same names."""
ROUTING = (
    "moe_router_topk",
    "moe_router_score_function",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk_scaling_factor",
    "moe_router_enable_expert_bias",
    "moe_router_bias_update_rate",
    "moe_router_dtype",
    "moe_apply_probs_on_input",
    "moe_router_load_balancing_type",
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
    "moe_token_dispatcher_type",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate",
    "moe_grouped_gemm",
)
"""Keys of experts that Megatron's TransformerConfig has under the same names."""


def virtual_stages(config: PretrainConfig) -> int | None:
    """Model chunks per pipeline rank; None without interleaving."""
    parallel = config.parallel
    if parallel.num_layers_per_virtual_pipeline_stage is None:
        return None
    layers = parallel.pipeline_model_parallel_size * parallel.num_layers_per_virtual_pipeline_stage
    return config.model.num_layers // layers


def has_fusions() -> bool:
    """Whether Megatron's fusions are used: torch.compile takes minutes on a CPU and gains nothing there."""
    return torch.cuda.is_available()


def transformer_config(config: PretrainConfig, names: WeightNames | None = None) -> TransformerConfig:
    """Megatron's configuration of the model and its parallelism.

    Args:
        config: of the run.
        names: draws the initial weights; default: by the configuration's seed.
    """
    model, parallel, recompute = config.model, config.parallel, config.recompute
    names = names or WeightNames(config.training.seed)
    dtype = torch.bfloat16 if config.training.bf16 else torch.float32
    fused = has_fusions()
    selective = recompute.recompute_granularity == "selective"
    kind = MLATransformerConfig if model.multi_latent_attention else TransformerConfig
    made = kind(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_dim,
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        layernorm_zero_centered_gamma=model.apply_layernorm_1p,
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        softmax_scale=model.score_scale,
        attention_output_gate=model.attention_output_gate,
        softmax_type=model.softmax_type,
        attention_dropout=model.attention_dropout,
        hidden_dropout=model.hidden_dropout,
        init_method=names.normal("weight", model.init_method_std),
        output_layer_init_method=names.normal(
            "residual", model.init_method_std / math.sqrt(2 * model.num_layers)
        ),
        embedding_init_method=names.normal("embedding", model.init_method_std),
        use_cpu_initialization=True,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_stages(config),
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        # Without overlap, the interleaved schedule puts several messages between two ranks into one batch, and trains
        # on wrong activations; the plain schedule does not support it.
        overlap_p2p_comm=parallel.virtual_pipeline,
        batch_p2p_comm=not parallel.virtual_pipeline,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=config.training.bf16,
        calculate_per_token_loss=config.training.calculate_per_token_loss,
        recompute_granularity=recompute.recompute_granularity,
        recompute_method=recompute.recompute_method,
        recompute_num_layers=recompute.recompute_num_layers,
        recompute_modules=list(recompute.recompute_modules) if selective else None,
        **_activation(config, fused=fused),
        bias_dropout_fusion=fused,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        **_layers(config),
        **_linear(config),
        **_latent(config),
        **_multi_token(config),
        **_experts(config),
    )
    for name, value in rope_attributes(config).items():
        setattr(made, name, value)
    setattr(made, UNIFORM_INIT, names.uniform)
    return made


def _activation(config: PretrainConfig, *, fused: bool) -> dict[str, Any]:
    """The MLP's activation. Of Megatron's fusions only that of plain swiglu is used: others approximate or refuse."""
    model = config.model
    name, gated = model.activation
    plain = model.glu_linear_offset == 0 and model.activation_func_clamp_value is None
    return {
        "gated_linear_unit": gated,
        "activation_func": ACTIVATIONS[name],
        "glu_linear_offset": model.glu_linear_offset,
        "activation_func_clamp_value": model.activation_func_clamp_value,
        "bias_activation_fusion": fused and name == "silu" and gated and plain,
    }


def _layers(config: PretrainConfig) -> dict[str, Any]:
    """Windows and RoPE by layer; layers of multi-token prediction, which follow the others, are like the last one."""
    model, rope, extra = config.model, config.rope, config.model.mtp_num_layers or 0
    skip, without = model.window_attn_skip_freq, rope.no_rope_freq
    if isinstance(skip, tuple):
        skip = (*skip, *skip[-1:] * extra)
    found: dict[str, Any] = {
        "window_size": model.window_size or None,
        "window_attn_skip_freq": list(skip) if isinstance(skip, tuple) else skip,
        "rotary_interleaved": rope.rotary_interleaved,
    }
    if without is not None:
        found["no_rope_freq"] = spelled_out(without, model.num_layers, every=-1)
    return found


def _linear(config: PretrainConfig) -> dict[str, Any]:
    """Widths of linear layers, and which they are, so that checkpoints keep layers of different kinds apart.

    Megatron's own field for the variant is about its own layers, and refuses ranks.
    """
    linear, layers = config.linear, range(1, config.model.num_layers + 1)
    if linear.experimental_attention_variant is None:
        return {}
    found: dict[str, Any] = {"linear_attention_freq": [int(linear.is_in(number)) for number in layers]}
    if linear.experimental_attention_variant == "gated_delta_net":
        found |= {name: getattr(linear, name) for name in DELTA_NET}
    return found


def _latent(config: PretrainConfig) -> dict[str, Any]:
    model = config.model
    if not model.multi_latent_attention:
        return {}
    return {
        "multi_latent_attention": True,
        "q_lora_rank": model.q_lora_rank,
        "kv_lora_rank": model.kv_lora_rank,
        "qk_head_dim": model.qk_head_dim,
        "qk_pos_emb_head_dim": model.qk_pos_emb_head_dim,
        "v_head_dim": model.v_head_dim,
        "rope_type": config.mla_rope_type,
        "rotary_base": model.rotary_base,
        **{name: getattr(config.rope, name) for name in LATENT_ROPE},
    }


def _multi_token(config: PretrainConfig) -> dict[str, Any]:
    model = config.model
    if model.mtp_num_layers is None:
        return {}
    return {
        "mtp_num_layers": model.mtp_num_layers,
        "mtp_loss_scaling_factor": model.mtp_loss_scaling_factor,
    }


def _experts(config: PretrainConfig) -> dict[str, Any]:
    experts, parallel = config.experts, config.parallel
    if experts.num_experts is None:
        return {}
    pre_softmax, freq = experts.moe_router_pre_softmax, experts.moe_layer_freq
    return {
        "num_moe_experts": experts.num_experts,
        "moe_ffn_hidden_size": config.expert_ffn_size,
        # With one expert, a softmax over the chosen experts is always 1, and the router would not learn.
        "moe_router_pre_softmax": experts.moe_router_topk == 1 if pre_softmax is None else pre_softmax,
        "moe_layer_freq": list(freq) if isinstance(freq, tuple) else freq,
        **{name: getattr(experts, name) for name in ROUTING},
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_size,
    }


def optimizer_config(config: PretrainConfig) -> OptimizerConfig:
    """Megatron's configuration of the optimizer; there is no weight decay on norms and biases."""
    settings = config.optimizer
    return OptimizerConfig(
        optimizer=settings.optimizer,
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=config.training.bf16,
        params_dtype=torch.bfloat16 if config.training.bf16 else torch.float32,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
