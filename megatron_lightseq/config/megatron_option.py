"""One option of Megatron's and what becomes of it: the row of the table in megatron_options.py.

Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

Verdict = Literal["honoured", "refused", "replaced", "outside"]
"""honoured: it has the effect that Megatron documents; refused: an error names it; replaced: the option only selects a
kernel, so ours runs instead and a log line says so; outside: it acts before, after or around attention."""
Kind = Literal["field", "constructor", "forward"]
"""What carries the option: a field of Megatron's configuration (and a flag of Megatron-LM), or an argument with which
``core_attention`` is built or called."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """When a row applies."""

    text: str
    """Completes "refused ..."."""
    holds: Callable[[Any], bool]
    """Of Megatron's configuration, or of Megatron-LM's arguments together with ours; absent names mean no."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spelling:
    """What a Megatron-LM argument that is not a key of ours means in a recipe: values for keys, or a refusal."""

    values: tuple[tuple[str, Any], ...] = ()
    """What it stands for, when given as a flag or as ``true``."""
    needs: str | None = None
    """A key that must be given as well; the argument itself then adds nothing."""
    refusal: str | None = None
    """What to do instead."""


KEEP = "Keep it with Megatron's own attention (cp_method megatron), or train without it"


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One row: options that are treated the same way."""

    names: tuple[str, ...]
    reason: str = ""
    """Why, as a clause."""
    attention: Verdict | None = None
    """In a model built with our layers; None: attention never sees it."""
    launcher: Verdict | None = None
    """On Megatron-LM's command line; None: as in attention. What is not refused or replaced is passed on, and "outside"
    marks refused fields that have no flag."""
    recipe: Spelling | Literal["key"] | None = None
    """In a recipe: a key of the same name, or what it stands for; None: as :func:`recipe_spellings` derives it."""
    kind: Kind = "field"
    harmless: tuple[Any, ...] = (None, False)
    """Of a refused or replaced option: values that ask for nothing. The first is what a replaced option is set to."""
    only: tuple[Any, ...] = ()
    """Of a refused option: if given, only these values are refused, alone or in a list."""
    condition: Condition | None = None
    """When a refusal applies; None: always."""
    remedy: str = KEEP

    @property
    def in_launcher(self) -> Verdict | None:
        """What the launcher does."""
        return self.launcher or self.attention

    def asks(self, value: Any) -> bool:
        """Whether a value asks for what this row refuses or replaces; enumerations are known by their names."""
        values = [_plain(each) for each in (value if isinstance(value, list | tuple) else [value])]
        if self.only:
            return any(each in self.only for each in values)
        return not all(_is_plain(each) and each in self.harmless for each in values)

    def applies(self, configuration: Any) -> bool:
        """Whether the condition holds."""
        return self.condition is None or self.condition.holds(configuration)


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, Enum) else value


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


# --- conditions -------------------------------------------------------------------------------------------------------


def _size(configuration: Any, name: str) -> int:
    return getattr(configuration, name, None) or 1


def _tokens_are_cut(configuration: Any) -> bool:
    sequence = _size(configuration, "tensor_model_parallel_size") > 1 and getattr(
        configuration, "sequence_parallel", False
    )
    return _size(configuration, "context_parallel_size") > 1 or sequence


def _drops_by_rank(configuration: Any) -> bool:
    by_position = getattr(configuration, "moe_token_drop_policy", "probs") == "position"
    padded = getattr(configuration, "moe_pad_expert_input_to_capacity", False)
    return _tokens_are_cut(configuration) and (by_position or padded)


def _documents_get_lost(arguments: Any) -> bool:
    dense = getattr(arguments, "create_attention_mask_in_dataloader", True)
    single = _size(arguments, "micro_batch_size") == _size(arguments, "pipeline_model_parallel_size") == 1
    return not (dense and single)


def _given(name: str) -> Callable[[Any], bool]:
    return lambda arguments: getattr(arguments, name, None) is not None


CUT_TOKENS = Condition(
    text="when the tokens of a micro-batch are cut over ranks, by context or sequence parallelism",
    holds=_tokens_are_cut,
)
DROPPED_BY_RANK = Condition(
    text="with moe_token_drop_policy position or moe_pad_expert_input_to_capacity, when the tokens of a micro-batch "
    "are cut over ranks, by context or sequence parallelism",
    holds=_drops_by_rank,
)
LOST_DOCUMENTS = Condition(
    text="unless micro_batch_size and pipeline_model_parallel_size are 1 and the data loader creates attention masks",
    holds=_documents_get_lost,
)
TENSOR_PARALLEL = Condition(
    text="with tensor parallelism", holds=lambda c: _size(c, "tensor_model_parallel_size") > 1
)
SLICED_MLP = Condition(text="with mlp_tile_tokens", holds=_given("mlp_tile_tokens"))
SLICED_LOSS = Condition(text="with loss_tile_tokens", holds=_given("loss_tile_tokens"))


# --- rows -------------------------------------------------------------------------------------------------------------

IN_LAUNCHER = "lightseq megatron-lm keeps it"
ROUTING = f"Recipes route every token, without capacities; {IN_LAUNCHER}"


def row(names: str, reason: str = "", **columns: Any) -> Option:
    """A row, from its names in one string."""
    return Option(names=tuple(names.split()), reason=reason, **columns)


def honoured(names: str, reason: str, **columns: Any) -> Option:
    """A row that attention honours."""
    return row(names, reason, attention="honoured", **columns)


def outside(names: str, reason: str, **columns: Any) -> Option:
    """A row that does not concern attention."""
    return row(names, reason, attention="outside", **columns)


def refused(names: str, reason: str, **columns: Any) -> Option:
    """A row that attention refuses, and with it the launcher."""
    return row(names, reason, attention="refused", **columns)


def launcher_row(names: str, reason: str, **columns: Any) -> Option:
    """A row that only the launcher refuses."""
    return row(names, reason, launcher="refused", **columns)


def instead(remedy: str) -> Spelling:
    """Refused in recipes, with what to do instead."""
    return Spelling(refusal=remedy)


def means(**values: Any) -> Spelling:
    """Short for these keys in recipes."""
    return Spelling(values=tuple(values.items()))


# --- messages ---------------------------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """A value in a message: as it is written, an enumeration by its member, anything else by its type."""
    value = value.name if isinstance(value, Enum) else value
    plain = isinstance(value, bool | int | float | str) or (
        isinstance(value, list | tuple) and all(isinstance(each, bool | int | float | str) for each in value)
    )
    return repr(value) if plain or value is None else type(value).__name__


def as_flag(name: str) -> str:
    """An option as it is written on a command line."""
    return f"--{name.replace('_', '-')}"


def with_flags(text: str, names: Iterable[str]) -> str:
    """The text with these options written as on a command line."""
    pattern = "|".join(rf"(?<![-\w]){name}\b" for name in sorted(names, key=len, reverse=True))
    return re.sub(pattern, lambda match: as_flag(match[0]), text) if pattern else text
