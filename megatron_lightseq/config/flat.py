"""The flat view of a configuration: the keys of all sections, by their unique names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, fields, replace
from functools import cache
from typing import Any, get_type_hints

from megatron_lightseq.config.sections import PretrainConfig


@cache
def section_types() -> dict[str, type]:
    """The dataclass of each section, by the section's name in :class:`PretrainConfig`."""
    hints = get_type_hints(PretrainConfig)
    return {section.name: hints[section.name] for section in fields(PretrainConfig)}


@cache
def section_of_key() -> dict[str, str]:
    """The section that holds each flat key, in the order of definition."""
    owner: dict[str, str] = {}
    for section, cls in section_types().items():
        for key in fields(cls):
            assert key.name not in owner, f"key {key.name} is in {owner[key.name]} and in {section}"
            owner[key.name] = section
    return owner


def keys() -> tuple[str, ...]:
    """Every configuration key."""
    return tuple(section_of_key())


def field_of_key(key: str) -> Field[Any]:
    """The dataclass field that defines a key."""
    cls = section_types()[section_of_key()[key]]
    return next(candidate for candidate in fields(cls) if candidate.name == key)


def to_flat(config: PretrainConfig) -> dict[str, Any]:
    """Every key with its value, in the order of definition."""
    return {key: getattr(getattr(config, section), key) for key, section in section_of_key().items()}


def value_of(config: PretrainConfig, key: str) -> Any:
    """The value of one key."""
    return getattr(getattr(config, section_of_key()[key]), key)


def from_flat(values: Mapping[str, Any]) -> PretrainConfig:
    """The configuration with these values and defaults for the rest; raises KeyError for an unknown key."""
    return with_values(PretrainConfig(), **values)


def with_values(config: PretrainConfig, **values: Any) -> PretrainConfig:
    """A copy with flat keys replaced; raises KeyError for an unknown key. Types are not checked here."""
    by_section: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        by_section.setdefault(section_of_key()[key], {})[key] = value
    changed = {name: replace(getattr(config, name), **found) for name, found in by_section.items()}
    return replace(config, **changed)
