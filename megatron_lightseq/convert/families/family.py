"""What a family of models is to the converter: recipe keys from config.json, and a table of names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_lightseq.config import PretrainConfig
from megatron_lightseq.convert.fields import Fields
from megatron_lightseq.convert.forms import SAME, Form

Keys = dict[str, Any]
"""Recipe keys and values."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One tensor of Megatron's, as tensors of the file."""

    theirs: tuple[str, ...]
    """Names in the file, with ``{layer}`` and ``{expert}`` counted from 0."""
    form: Form = SAME
    per_expert: bool = False
    """The tensors of the file have one more dimension, the first: all experts of the layer."""
    float32: bool = False
    """Kept in float32 beside weights of another dtype."""


Names = Mapping[str, Rule]
"""By Megatron's names, with ``{layer}`` and ``{expert}`` for the numbers."""


NEXT_LAYER = "model.layers.{layers}."
"""Prefix of a layer after the last one."""


@dataclass(frozen=True, slots=True)
class Family:
    """One ``model_type``.

    ``keys`` reads every field of config.json that matters. ``names`` covers every tensor that a model of such keys
    can have; what the model does not have is not looked up.
    """

    keys: Callable[[Fields], Keys]
    names: Callable[[PretrainConfig], Names]
    left_out: str | None = None
    """Prefix of tensors that files may hold beside the model's, with ``{layers}`` for their number: multi-token
    prediction, which transformers leaves out too."""


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor of the file, or with ``expert`` one expert's slice of it."""

    name: str
    expert: int | None = None


_LAYER = re.compile(r"\blayers\.(\d+)\.")
_EXPERT = re.compile(r"\blocal_experts\.(\d+)\.")


def places(names: Names, ours: str) -> tuple[Rule, tuple[Place, ...]] | None:
    """Where one of Megatron's tensors is found in the file; None if the table does not name it."""
    layer, expert = _LAYER.search(ours), _EXPERT.search(ours)
    general = _EXPERT.sub("local_experts.{expert}.", _LAYER.sub("layers.{layer}.", ours))
    rule = names.get(general)
    if rule is None:
        return None
    numbers = {"layer": layer and layer[1], "expert": expert and expert[1]}
    number = int(expert[1]) if rule.per_expert and expert else None
    return rule, tuple(Place(name.format(**numbers), number) for name in rule.theirs)
