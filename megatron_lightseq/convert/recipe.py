"""From config.json to a recipe, and back to a config.json that says what has changed in training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_lightseq.config import PretrainConfig
from megatron_lightseq.config.flat import section_of_key, section_types, to_flat
from megatron_lightseq.config.load import from_entries
from megatron_lightseq.config.strict_yaml import Entry, dump_scalar
from megatron_lightseq.config.validate import TRAINING_RULES, validate
from megatron_lightseq.convert.families.family import Family, Keys
from megatron_lightseq.convert.families.rope import write_rope
from megatron_lightseq.convert.families.table import family_of
from megatron_lightseq.convert.fields import Fields
from megatron_lightseq.errors import UnsupportedError, explain

LONGEST_SUGGESTED = 4096
"""The seq_length that an imported recipe starts with, if the model reaches that far."""
FINE_TUNING = {"lr": 1e-5, "min_lr": 1e-6}
"""A trained model is destroyed by the default learning rate, which is for models that start from nothing."""

_ALWAYS = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels position_embedding_type "
    "rotary_base normalization norm_epsilon swiglu untie_embeddings_and_output_weights make_vocab_size_divisible_by "
    "seq_length bf16 vocab_size tokenizer_type"
)
"""Keys that an imported recipe spells out, whatever their defaults are."""
_OF_TRAINING = (
    "attention_dropout hidden_dropout init_method_std make_vocab_size_divisible_by mtp_loss_scaling_factor "
    "moe_router_load_balancing_type moe_aux_loss_coeff moe_z_loss_coeff moe_token_dispatcher_type moe_grouped_gemm "
    "moe_router_bias_update_rate moe_router_dtype cp_linear_scan cp_linear_kernel"
)
"""Keys of the model's sections that change how it is trained, and not what it computes."""


def recipe_of(config: Mapping[str, Any], origin: str, ignored: Iterable[str] = ()) -> PretrainConfig:
    """The recipe of a model.

    Args:
        config: the fields of config.json.
        origin: named in errors.
        ignored: fields that the user has said to be without effect.

    Raises:
        ConfigError: a field is absent or of the wrong type, or the model breaks a rule of recipes.
        UnsupportedError: an unknown family or field, or something that recipes cannot say.
    """
    return _checked(keys_of(config, origin, ignored), origin)


def keys_of(config: Mapping[str, Any], origin: str, ignored: Iterable[str] = ()) -> Keys:
    """The keys of :func:`recipe_of`, before they are checked."""
    family = family_of(config.get("model_type"), origin)
    fields = Fields(config, origin, ignored)
    fields.expect("quantization_config", None)
    keys = family.keys(fields)
    fields.finish()
    keys.setdefault("position_embedding_type", "rope")
    reach = keys["max_position_embeddings"]
    # Padding the vocabulary further than it is would add rows that no file has.
    keys["make_vocab_size_divisible_by"] = math.gcd(keys["vocab_size"], 128) or 1
    return {**keys, "seq_length": min(reach, LONGEST_SUGGESTED), **FINE_TUNING}


def names_of(config: Mapping[str, Any], origin: str) -> Family:
    """The family whose table of names applies."""
    return family_of(config.get("model_type"), origin)


def _checked(keys: Keys, origin: str) -> PretrainConfig:
    missing = sorted(set(keys) - set(section_of_key()))
    if missing:
        raise UnsupportedError(
            explain(
                got=f"{origin}, which needs {', '.join(f'{key}: {keys[key]!r}' for key in missing)}",
                rule="a recipe describes the whole model, and this version has no such keys",
                remedy="Choose a model that does not need them, or a version that has them",
            )
        )
    config = from_entries([{key: Entry(value, origin) for key, value in keys.items()}])
    validate(config, rule_sets=TRAINING_RULES)
    return config


def recipe_text(config: PretrainConfig, comment: str) -> str:
    """A YAML file with the keys that differ from their defaults, and those that every model has."""
    values, usual = to_flat(config), to_flat(PretrainConfig())
    lines = [f"# {line}" for line in comment.splitlines()]
    for section in section_types():
        keys = [
            key
            for key, owner in section_of_key().items()
            if owner == section and (values[key] != usual[key] or key in _ALWAYS.split())
        ]
        lines += ["", f"# {section}"] if keys else []
        for key in keys:
            value = list(values[key]) if isinstance(values[key], tuple) else values[key]
            lines.append(f"{key}: {dump_scalar(value)}")
    return "\n".join(lines) + "\n"


def updated(carried: Mapping[str, Any], trained: PretrainConfig, origin: str) -> dict[str, Any]:
    """The config.json of a trained model: as it was carried, with what the run has changed.

    RoPE and the longest sequence are written anew if the run has changed them. What is written is then read as an
    import reads it, so that nothing can get lost.

    Raises:
        UnsupportedError: the run has changed something that cannot be written back.
    """
    found = {**carried, "torch_dtype": "bfloat16" if trained.training.bf16 else "float32"}
    found.pop("dtype", None)
    found.pop("auto_map", None)  # code that is not carried
    changed = _changed(found, trained, origin)
    if "max_position_embeddings" in changed:
        found["max_position_embeddings"] = (
            trained.model.max_position_embeddings or trained.training.seq_length
        )
    if set(changed) & _of_rope():
        write_rope(found, trained)
    left = _changed(found, trained, origin)
    for key, (imported, now) in left.items():
        raise UnsupportedError(
            explain(
                got=f"{key} {imported!r} in {origin} and {now!r} in the run",
                rule="config.json is written back with RoPE and max_position_embeddings changed only",
                remedy=f"Give a config.json that says it with --like FOLDER, or train with {key} as it was",
            )
        )
    return found


def _changed(fields: Mapping[str, Any], trained: PretrainConfig, origin: str) -> dict[str, tuple[Any, Any]]:
    """Keys of the model in which a run differs from config.json: their values there and here."""
    imported, now = to_flat(_checked(keys_of(fields, origin, fields), origin)), to_flat(trained)
    now["max_position_embeddings"] = now["max_position_embeddings"] or now["seq_length"]
    of_model = {
        key for key, section in section_of_key().items() if section in ("model", "experts", "linear", "rope")
    }
    keys = of_model - set(_OF_TRAINING.split())
    return {key: (imported[key], now[key]) for key in sorted(keys) if imported[key] != now[key]}


def _of_rope() -> set[str]:
    """Keys that :func:`write_rope` writes."""
    of_section = {key for key, section in section_of_key().items() if section == "rope"}
    return {*of_section, "rotary_base", "position_embedding_type"}
