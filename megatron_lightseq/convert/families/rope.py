"""RoPE and its scalings, from config.json to recipe keys."""

from __future__ import annotations

import math
from typing import Any

from megatron_lightseq.convert.families.family import Keys
from megatron_lightseq.convert.fields import Fields

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Megatron-Core fixes of Llama 3's scaling; the factor is free."""


def rope_keys(fields: Fields, *, theta: float = 10000.0, latent: bool = False) -> Keys:
    """The keys of a model with one kind of RoPE.

    Args:
        fields: with ``rope_parameters``, or as before transformers 5 with ``rope_theta`` and ``rope_scaling``.
        theta: base of the family where the file does not say it.
        latent: whether attention is multi-latent, for which YaRN has keys of its own.

    Raises:
        UnsupportedError: a scaling that recipes cannot say.
    """
    base = fields.real("rope_theta", theta)
    partial = fields.real("partial_rotary_factor", 1.0)
    old, new = fields.part("rope_scaling", {}), fields.part("rope_parameters", {})
    part = new if "rope_parameters" in fields else old
    return parameters_to_keys(part, fields, base, partial, latent=latent)


def parameters_to_keys(
    part: Fields, fields: Fields, base: float, partial: float = 1.0, *, latent: bool = False
) -> Keys:
    """The keys of one object of RoPE's parameters; ``base`` and ``partial`` are for those that do not say them."""
    keys: Keys = {"rotary_base": part.real("rope_theta", base)}
    partial = part.real("partial_rotary_factor", partial)
    if partial != 1.0:
        keys["rotary_percent"] = partial
    kind = part.take("rope_type", part.take("type", "default"))
    if kind == "linear":
        keys["rotary_seq_len_interpolation_factor"] = part.real("factor")
    elif kind == "llama3":
        for name, value in _LLAMA3.items():
            part.expect(name, value)
        keys |= {"use_rope_scaling": True, "rope_scaling_factor": part.real("factor")}
    elif kind == "yarn":
        keys |= _latent_yarn(part, fields) if latent else _yarn(part, fields)
    elif kind == "longrope":
        keys |= _longrope(part, fields)
    elif kind != "default":
        raise part.refusal("rope_type", kind, "recipes have default, linear, llama3, yarn and longrope")
    part.finish()
    return keys


def _yarn(part: Fields, fields: Fields) -> Keys:
    keys: Keys = {
        "position_embedding_type": "yarn",
        "yarn_rotary_scaling_factor": part.real("factor"),
        "yarn_original_max_position_embeddings": _original_length(part, fields),
        "yarn_beta_fast": part.real("beta_fast", 32.0),
        "yarn_beta_slow": part.real("beta_slow", 1.0),
    }
    if "mscale" in part and "mscale_all_dim" in part:
        keys |= {"yarn_mscale": part.real("mscale"), "yarn_mscale_all_dim": part.real("mscale_all_dim")}
    if not _takes_false(part, "truncate"):
        keys["yarn_correction_range_round_to_int"] = False
    _expect_attention_factor(part, 0.1 * math.log(keys["yarn_rotary_scaling_factor"]) + 1.0)
    return keys


def _latent_yarn(part: Fields, fields: Fields) -> Keys:
    return {
        "rope_type": "yarn",
        "rotary_scaling_factor": part.real("factor"),
        "original_max_position_embeddings": _original_length(part, fields),
        "beta_fast": part.real("beta_fast", 32.0),
        "beta_slow": part.real("beta_slow", 1.0),
        "mscale": part.real("mscale", 1.0),
        "mscale_all_dim": part.real("mscale_all_dim", 0.0),
    }


def _longrope(part: Fields, fields: Fields) -> Keys:
    original = fields.take("original_max_position_embeddings", None)
    original = part.whole("original_max_position_embeddings", original)
    factor = fields.whole("max_position_embeddings") / original
    _expect_attention_factor(
        part, math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    )
    part.expect("factor", factor)
    return {
        "rope_type": "longrope",
        "original_max_position_embeddings": original,
        "longrope_short_factor": part.items("short_factor"),
        "longrope_long_factor": part.items("long_factor"),
    }


def _original_length(part: Fields, fields: Fields) -> int:
    return part.whole("original_max_position_embeddings", fields.whole("max_position_embeddings"))


def _takes_false(part: Fields, name: str) -> bool:
    value: Any = part.take(name, True)
    return bool(value)


def _expect_attention_factor(part: Fields, usual: float) -> None:
    """Scale of cosines and sines: recipes compute it."""
    given = part.real("attention_factor", usual)
    if not math.isclose(given, usual, rel_tol=1e-6):
        raise part.refusal("attention_factor", given, f"recipes compute it from the other numbers: {usual}")
