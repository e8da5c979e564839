"""Rules on rotary position embeddings (RoPE)."""

from __future__ import annotations

import math
from typing import Any

from megatron_lightseq.config.rules import Machine, RuleSet
from megatron_lightseq.config.sections import PretrainConfig
from megatron_lightseq.config.sections_rope import RopeConfig

ROPE = RuleSet()

_DEFAULTS = RopeConfig()
_YARN_KEYS = (
    "yarn_rotary_scaling_factor",
    "yarn_original_max_position_embeddings",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_mscale",
    "yarn_mscale_all_dim",
    "yarn_correction_range_round_to_int",
)
_LATENT_KEYS = ("rotary_scaling_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_LONG_KEYS = ("longrope_short_factor", "longrope_long_factor")
_PLAIN_KEYS = (
    "rotary_interleaved",
    "rotary_base_local",
    "no_rope_freq",
    "rotary_seq_len_interpolation_factor",
    "use_rope_scaling",
)


def _unchanged(c: PretrainConfig, keys: tuple[str, ...]) -> bool:
    return all(getattr(c.rope, key) == getattr(_DEFAULTS, key) for key in keys)


def _rotates(c: PretrainConfig) -> bool:
    return c.model.position_embedding_type in ("rope", "yarn")


def _is_long(c: PretrainConfig) -> bool:
    return c.rope.rope_type == "longrope"


@ROPE.rule(
    "position_embedding_type",
    *_PLAIN_KEYS,
    "rope_type",
    remedy="Set position_embedding_type to rope, or remove the other keys",
)
def rope_keys_need_rope(c: PretrainConfig, _: Machine) -> bool:
    """scaling, bases and patterns of RoPE need position_embedding_type rope or yarn."""
    return _rotates(c) or (_unchanged(c, _PLAIN_KEYS) and c.rope.rope_type is None)


@ROPE.rule(
    "position_embedding_type",
    *_YARN_KEYS,
    remedy="Set position_embedding_type to yarn, or remove the yarn_* keys; with multi_latent_attention the keys are "
    "rotary_scaling_factor and those beside it",
)
def yarn_keys_need_yarn(c: PretrainConfig, _: Machine) -> bool:
    """the yarn_* keys need position_embedding_type yarn."""
    return c.model.position_embedding_type == "yarn" or _unchanged(c, _YARN_KEYS)


@ROPE.rule(
    "position_embedding_type",
    "yarn_rotary_scaling_factor",
    "yarn_original_max_position_embeddings",
    remedy="Set yarn_rotary_scaling_factor and yarn_original_max_position_embeddings",
)
def yarn_knows_its_context(c: PretrainConfig, _: Machine) -> bool:
    """YaRN needs to know the original context and how many times it is extended."""
    given = (c.rope.yarn_rotary_scaling_factor, c.rope.yarn_original_max_position_embeddings)
    return c.model.position_embedding_type != "yarn" or None not in given


@ROPE.rule(
    "yarn_mscale",
    "yarn_mscale_all_dim",
    remedy="Set both, or neither",
)
def yarn_scales_are_given_together(c: PretrainConfig, _: Machine) -> bool:
    """Megatron ignores one of yarn_mscale and yarn_mscale_all_dim without the other."""
    return (c.rope.yarn_mscale is None) == (c.rope.yarn_mscale_all_dim is None)


@ROPE.rule(
    "position_embedding_type",
    "rotary_interleaved",
    remedy="Set rotary_interleaved to false, or position_embedding_type to rope",
)
def yarn_rotates_halves(c: PretrainConfig, _: Machine) -> bool:
    """Megatron's YaRN does not rotate neighbouring dimensions."""
    return c.model.position_embedding_type != "yarn" or not c.rope.rotary_interleaved


@ROPE.rule(
    "position_embedding_type",
    "use_rope_scaling",
    "rotary_seq_len_interpolation_factor",
    "rope_type",
    remedy="Keep one of them",
)
def rope_is_scaled_once(c: PretrainConfig, _: Machine) -> bool:
    """RoPE has one scaling: yarn, use_rope_scaling (Llama 3), rotary_seq_len_interpolation_factor (linear) or
    longrope.
    """
    linear = c.rope.rotary_seq_len_interpolation_factor is not None
    yarn = c.model.position_embedding_type == "yarn"
    return yarn + c.rope.use_rope_scaling + linear + _is_long(c) <= 1


@ROPE.rule(
    "use_rope_scaling",
    "rope_scaling_factor",
    remedy="Set use_rope_scaling to true, or remove rope_scaling_factor",
)
def rope_scaling_factor_is_used(c: PretrainConfig, _: Machine) -> bool:
    """rope_scaling_factor belongs to use_rope_scaling."""
    return c.rope.use_rope_scaling or _unchanged(c, ("rope_scaling_factor",))


@ROPE.rule(
    "rotary_base_local",
    "window_size",
    "position_embedding_type",
    remedy="Set window_size and position_embedding_type rope, or remove rotary_base_local",
)
def local_base_has_windows(c: PretrainConfig, _: Machine) -> bool:
    """rotary_base_local is the base of RoPE in layers with a window, beside a RoPE without YaRN in the others."""
    fits = c.model.num_window_layers > 0 and c.model.position_embedding_type == "rope"
    return c.rope.rotary_base_local is None or fits


@ROPE.rule(
    "multi_latent_attention",
    *_PLAIN_KEYS,
    "rope_type",
    remedy="Remove them, and scale with rotary_scaling_factor",
)
def latent_attention_scales_with_yarn(c: PretrainConfig, _: Machine) -> bool:
    """the RoPE of multi_latent_attention is plain or YaRN's, in every layer alike."""
    return not c.model.multi_latent_attention or (_unchanged(c, _PLAIN_KEYS) and not _is_long(c))


@ROPE.rule(
    "multi_latent_attention",
    "rope_type",
    *_LATENT_KEYS,
    remedy="Remove them; without multi_latent_attention YaRN is position_embedding_type yarn with the yarn_* keys",
)
def latent_rope_needs_latent_attention(c: PretrainConfig, _: Machine) -> bool:
    """rope_type yarn, rotary_scaling_factor and the keys beside it belong to multi_latent_attention."""
    unused = _unchanged(c, _LATENT_KEYS) and c.rope.rope_type != "yarn"
    return c.model.multi_latent_attention or unused


@ROPE.rule(
    "rope_type",
    *_LATENT_KEYS,
    remedy="Set rotary_scaling_factor above 1 and rope_type to yarn or null, or remove all of them",
)
def latent_yarn_extends(c: PretrainConfig, _: Machine) -> bool:
    """YaRN extends the context rotary_scaling_factor times, and plain RoPE does not."""
    if not c.model.multi_latent_attention:
        return True  # this has its own rule
    if c.mla_rope_type == "rope":
        return _unchanged(c, _LATENT_KEYS)
    return c.rope.rotary_scaling_factor > 1


@ROPE.rule(
    "original_max_position_embeddings",
    "rope_type",
    "multi_latent_attention",
    remedy="Set rope_type to longrope, or with multi_latent_attention rotary_scaling_factor, or remove it",
)
def original_context_is_used(c: PretrainConfig, _: Machine) -> bool:
    """original_max_position_embeddings belongs to longrope, and to the YaRN of multi_latent_attention."""
    yarn = c.model.multi_latent_attention and c.mla_rope_type == "yarn"
    return _is_long(c) or yarn or _unchanged(c, ("original_max_position_embeddings",))


@ROPE.rule(
    "rope_type",
    *_LONG_KEYS,
    remedy="Set rope_type to longrope with both lists, or remove them",
)
def longrope_has_factors(c: PretrainConfig, _: Machine) -> bool:
    """longrope divides frequencies by longrope_short_factor or longrope_long_factor, which nothing else uses."""
    given = [bool(getattr(c.rope, key)) for key in _LONG_KEYS]
    return all(given) if _is_long(c) else not any(given)


@ROPE.rule(
    *_LONG_KEYS,
    "kv_channels",
    "rotary_percent",
    remedy="Give one positive number for each pair of dimensions that RoPE rotates",
)
def longrope_factors_fit(c: PretrainConfig, _: Machine) -> bool:
    """longrope has one divisor for each frequency: half of the head dimension times rotary_percent."""
    pairs = int(c.model.head_dim * c.model.rotary_percent) // 2
    lists: list[tuple[Any, ...]] = [getattr(c.rope, key) for key in _LONG_KEYS]
    return all(not x or (len(x) == pairs and all(0 < y < math.inf for y in x)) for x in lists)
