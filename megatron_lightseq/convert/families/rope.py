"""RoPE and its scalings, from config.json to recipe keys and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_lightseq.config import PretrainConfig
from megatron_lightseq.convert.families.family import Keys
from megatron_lightseq.convert.fields import Fields

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Megatron-Core fixes of Llama 3's scaling; the factor is free."""


OF_IMAGES = ("mrope_section", "mrope_interleaved")
"""RoPE's parameters for positions in images; all three positions of a text's token are the same."""


def rope_keys(
    fields: Fields,
    *,
    theta: float = 10000.0,
    partial: float = 1.0,
    latent: bool = False,
    ignored: tuple[str, ...] = (),
) -> Keys:
    """The keys of a model with one kind of RoPE.

    Args:
        fields: with ``rope_parameters``, or as before transformers 5 with ``rope_theta`` and ``rope_scaling``.
        theta: base of the family where the file does not say it.
        partial: fraction of each head that is rotated, likewise.
        latent: whether attention is multi-latent, for which YaRN has keys of its own.
        ignored: parameters without effect on this family.

    Raises:
        UnsupportedError: a scaling that recipes cannot say.
    """
    base = fields.real("rope_theta", theta)
    partial = fields.real("partial_rotary_factor", partial)
    old, new = fields.part("rope_scaling", {}), fields.part("rope_parameters", {})
    part = new if "rope_parameters" in fields else old
    for name in ignored:
        part.take(name, None)
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
    factor = part.real("factor")
    keys: Keys = {
        "position_embedding_type": "yarn",
        "yarn_rotary_scaling_factor": factor,
        "yarn_original_max_position_embeddings": _original_length(part, fields),
        "yarn_beta_fast": part.real("beta_fast", 32.0),
        "yarn_beta_slow": part.real("beta_slow", 1.0),
    }
    mscale, all_dim = _mscales(part)
    if all_dim:
        keys |= {"yarn_mscale": mscale, "yarn_mscale_all_dim": all_dim}
    if not _takes_false(part, "truncate"):
        keys["yarn_correction_range_round_to_int"] = False
    _expect_attention_factor(part, _yarn_scale(factor, mscale) / _yarn_scale(factor, all_dim))
    return keys


def _latent_yarn(part: Fields, fields: Fields) -> Keys:
    factor = part.real("factor")
    mscale, all_dim = _mscales(part)
    _expect_attention_factor(part, _yarn_scale(factor, mscale) / _yarn_scale(factor, all_dim))
    return {
        "rope_type": "yarn",
        "rotary_scaling_factor": factor,
        "original_max_position_embeddings": _original_length(part, fields),
        "beta_fast": part.real("beta_fast", 32.0),
        "beta_slow": part.real("beta_slow", 1.0),
        "mscale": mscale,
        "mscale_all_dim": all_dim,
    }


def _mscales(part: Fields) -> tuple[float, float]:
    """Weights of the logarithm in YaRN's scale and in its divisor; transformers wants both or uses neither."""
    mscale, all_dim = part.real("mscale", 0.0), part.real("mscale_all_dim", 0.0)
    if bool(mscale) != bool(all_dim):
        given = {"mscale": mscale, "mscale_all_dim": all_dim}
        raise part.refusal("mscale and mscale_all_dim", given, "both of them scale YaRN, or neither")
    return (mscale, all_dim) if mscale else (1.0, 0.0)


def _yarn_scale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


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


# ---- and back -------------------------------------------------------------------------------------------------


def write_rope(found: dict[str, Any], config: PretrainConfig) -> None:
    """Say in the fields of a config.json, in the form in which it has them, which RoPE a run has trained with."""
    parameters, local = _parameters(config), config.rope.rotary_base_local
    old = found.get("rope_parameters")
    if old is None:
        found["rope_theta"] = parameters.pop("rope_theta")
        found["rope_scaling"] = None if parameters == {"rope_type": "default"} else parameters
        if local is not None:
            found["rope_local_base_freq"] = _shown(local)
        return
    found.pop("rope_theta", None)
    if local is None:
        found["rope_parameters"] = _with_unchanged(parameters, old)
    else:
        short = {"rope_type": "default", "rope_theta": _shown(local)}
        found["rope_parameters"] = {"full_attention": parameters, "sliding_attention": short}


def _parameters(config: PretrainConfig) -> dict[str, Any]:
    """RoPE's parameters as transformers names them."""
    model, rope = config.model, config.rope
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": _shown(model.rotary_base)}
    if model.position_embedding_type == "yarn":
        found |= {
            "rope_type": "yarn",
            "factor": rope.yarn_rotary_scaling_factor,
            "original_max_position_embeddings": rope.yarn_original_max_position_embeddings,
            **_yarn_parameters(rope.yarn_beta_fast, rope.yarn_beta_slow),
        }
        if rope.yarn_mscale_all_dim:
            found |= {"mscale": rope.yarn_mscale or 1.0, "mscale_all_dim": rope.yarn_mscale_all_dim}
        if not rope.yarn_correction_range_round_to_int:
            found["truncate"] = False
    elif model.multi_latent_attention and config.mla_rope_type == "yarn":
        found |= {
            "rope_type": "yarn",
            "factor": rope.rotary_scaling_factor,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
            **_yarn_parameters(rope.beta_fast, rope.beta_slow),
        }
        if rope.mscale_all_dim:
            found |= {"mscale": rope.mscale, "mscale_all_dim": rope.mscale_all_dim}
    elif rope.use_rope_scaling:
        found |= {"rope_type": "llama3", "factor": rope.rope_scaling_factor, **_LLAMA3}
    elif rope.rotary_seq_len_interpolation_factor is not None:
        found |= {"rope_type": "linear", "factor": rope.rotary_seq_len_interpolation_factor}
    elif rope.rope_type == "longrope":
        found |= {
            "rope_type": "longrope",
            "original_max_position_embeddings": rope.original_max_position_embeddings,
            "short_factor": list(rope.longrope_short_factor),
            "long_factor": list(rope.longrope_long_factor),
        }
    return found


def _yarn_parameters(beta_fast: float, beta_slow: float) -> dict[str, float]:
    return {"beta_fast": beta_fast, "beta_slow": beta_slow}


def _with_unchanged(parameters: dict[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """With what a run does not change: the fraction of each head that is rotated, and positions in images."""
    names = ("partial_rotary_factor", *OF_IMAGES)
    return {**parameters, **{name: old[name] for name in names if old.get(name) is not None}}


def _shown(number: float) -> float:
    return int(number) if number == int(number) else number
