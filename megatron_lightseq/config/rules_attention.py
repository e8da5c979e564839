"""Rules on activations, on attention's scores, and on patterns over layers."""

from __future__ import annotations

from megatron_lightseq.config.layer_pattern import LayerPattern
from megatron_lightseq.config.rules import Machine, RuleSet
from megatron_lightseq.config.sections import PretrainConfig
from megatron_lightseq.config.sections_model import ModelConfig

LAYERS, ACTIVATIONS, SCORES = RuleSet(), RuleSet(), RuleSet()


def pattern_fits(pattern: LayerPattern | None, num_layers: int) -> bool:
    """Whether a pattern is a number of layers, or has one 0 or 1 for each layer."""
    if pattern is None or isinstance(pattern, int):
        return pattern is None or pattern >= 1
    return len(pattern) == num_layers and set(pattern) <= {0, 1}


PATTERN_REMEDY = "Write a number of 1 or more, or {num_layers} entries of 0 or 1"


@LAYERS.rule("window_attn_skip_freq", "num_layers", remedy=PATTERN_REMEDY)
def window_pattern_fits(c: PretrainConfig, _: Machine) -> bool:
    """window_attn_skip_freq is a number of layers, or a list with one 0 or 1 for each of num_layers."""
    return pattern_fits(c.model.window_attn_skip_freq, c.model.num_layers)


@LAYERS.rule("no_rope_freq", "num_layers", remedy=PATTERN_REMEDY)
def no_rope_pattern_fits(c: PretrainConfig, _: Machine) -> bool:
    """no_rope_freq is a number of layers, or a list with one 0 or 1 for each of num_layers."""
    return pattern_fits(c.rope.no_rope_freq, c.model.num_layers)


@LAYERS.rule("moe_layer_freq", "num_layers", remedy=PATTERN_REMEDY)
def expert_pattern_fits(c: PretrainConfig, _: Machine) -> bool:
    """moe_layer_freq is a number of layers, or a list with one 0 or 1 for each of num_layers."""
    return pattern_fits(c.experts.moe_layer_freq, c.model.num_layers)


# --- activations ------------------------------------------------------------------------------------------------


@ACTIVATIONS.rule(
    "swiglu",
    "squared_relu",
    "quick_geglu",
    "gated_linear_unit",
    "activation_func",
    remedy="Keep one, and set swiglu to false for the others",
)
def activation_is_named_once(c: PretrainConfig, _: Machine) -> bool:
    """the activation is swiglu (the default), squared_relu, quick_geglu, or activation_func with or without
    gated_linear_unit.
    """
    model = c.model
    own = model.activation_func is not None or model.gated_linear_unit
    return model.swiglu + model.squared_relu + model.quick_geglu + own <= 1


@ACTIVATIONS.rule(
    "glu_linear_offset",
    "activation_func_clamp_value",
    "swiglu",
    "gated_linear_unit",
    remedy="Use a gated MLP (swiglu, quick_geglu or gated_linear_unit), or remove them",
)
def gate_options_need_a_gate(c: PretrainConfig, _: Machine) -> bool:
    """glu_linear_offset and activation_func_clamp_value act on the two halves of a gated MLP."""
    unused = c.model.glu_linear_offset == 0 and c.model.activation_func_clamp_value is None
    return c.model.activation[1] or unused


# --- scores -----------------------------------------------------------------------------------------------------


@SCORES.rule(
    "softmax_scale",
    "query_pre_attn_scalar",
    remedy="Keep one of them",
)
def scores_are_scaled_once(c: PretrainConfig, _: Machine) -> bool:
    """softmax_scale and query_pre_attn_scalar are two ways to write one number."""
    return c.model.softmax_scale is None or c.model.query_pre_attn_scalar is None


@SCORES.rule(
    "qk_layernorm",
    "qk_l2_norm",
    remedy="Keep one of them",
)
def queries_are_normalised_once(c: PretrainConfig, _: Machine) -> bool:
    """queries and keys are normalised with weights (qk_layernorm) or without (qk_l2_norm)."""
    return not (c.model.qk_layernorm and c.model.qk_l2_norm)


@SCORES.rule(
    "multi_latent_attention",
    "softmax_scale",
    "query_pre_attn_scalar",
    "qk_l2_norm",
    "add_qkv_bias",
    "attention_output_gate",
    remedy="Remove the other keys, or multi_latent_attention",
)
def latent_attention_is_plain(c: PretrainConfig, _: Machine) -> bool:
    """Megatron's latent attention has its own scale, and no L2 norm, QKV bias or output gate."""
    model = c.model
    extras = model.qk_l2_norm or model.add_qkv_bias or model.attention_output_gate
    return not model.multi_latent_attention or (model.score_scale is None and not extras)


@SCORES.rule(
    "attn_temperature_tuning",
    "no_rope_freq",
    "attn_scale",
    "floor_scale",
    remedy="Set attn_temperature_tuning and no_rope_freq, or remove all of them",
)
def temperature_needs_layers_without_rope(c: PretrainConfig, _: Machine) -> bool:
    """attn_temperature_tuning scales queries in layers without RoPE; attn_scale and floor_scale say how."""
    model, defaults = c.model, ModelConfig()
    unchanged = (model.attn_scale, model.floor_scale) == (defaults.attn_scale, defaults.floor_scale)
    return c.rope.no_rope_freq is not None if model.attn_temperature_tuning else unchanged


@SCORES.rule(
    "cp_method",
    "attn_logit_softcapping",
    "attention_chunk_size",
    "attn_temperature_tuning",
    remedy="Choose another cp_method",
)
def megatrons_scores_are_plain(c: PretrainConfig, _: Machine) -> bool:
    """Megatron's own attention bounds no scores, has no chunks, and does not scale queries by their positions."""
    model = c.model
    extras = (model.attn_logit_softcapping, model.attention_chunk_size, model.attn_temperature_tuning or None)
    return c.context.cp_method != "megatron" or extras == (None, None, None)
