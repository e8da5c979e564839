"""Rules between configuration keys: named, enumerable, and reported all at once.

Every rule says what must hold, and its message gives the values, the rule and the remedy. Rules of one key (bounds)
run first; a rule whose keys are already out of bounds is not asked, so one mistake makes one message.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_lightseq.config.flat import to_flat
from megatron_lightseq.config.sections import PretrainConfig
from megatron_lightseq.errors import ConfigError, explain


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What a run will find around it; None means not known, and rules that need it are not asked."""

    world_size: int | None = None
    """Number of ranks that torchrun starts."""
    num_gpus: int | None = None
    """Number of CUDA devices visible on this host."""
    has_transformer_engine: bool | None = None
    """Whether Transformer Engine is installed."""
    has_flash_attn: bool | None = None
    """Whether the flash-attn package is installed."""


Predicate = Callable[[PretrainConfig, Machine], bool]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One condition on a configuration."""

    name: str
    """Unique; tests have one failing configuration per name."""
    keys: tuple[str, ...]
    """The keys whose values the message shows."""
    holds: Predicate
    """Whether a configuration obeys."""
    text: str
    """What must hold, in words."""
    remedy: str
    """What to do; `{key}` stands for a key's value, also `{world_size}` and `{num_gpus}`."""
    needs: str | None = None
    """The field of :class:`Machine` without which the rule cannot be asked."""

    def message(self, config: PretrainConfig, machine: Machine) -> str:
        """Values, rule and remedy, for a configuration that breaks the rule."""
        values = to_flat(config)
        shown = [f"{key} {_shown(values[key])}" for key in self.keys]
        if self.needs is not None:
            shown.append(f"{self.needs.replace('_', ' ')} {_shown(getattr(machine, self.needs))}")
        facts = {**values, "world_size": machine.world_size, "num_gpus": machine.num_gpus}
        return explain(got=", ".join(shown), rule=self.text, remedy=self.remedy.format_map(facts))


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return "[" + ", ".join(map(str, value)) + "]" if isinstance(value, tuple) else str(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """The range of one number; None (null) always passes."""

    low: float
    high: float = math.inf
    open_low: bool = False
    """Whether `low` itself is outside."""
    open_high: bool = True
    """Whether `high` itself is outside; infinity always is."""

    def contains(self, value: float | None) -> bool:
        """Whether the value is inside; NaN never is."""
        if value is None:
            return True
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        low = f"{'>' if self.open_low else '>='} {self.low:g}"
        if self.high == math.inf:
            return f"a finite number {low}"
        return f"{low} and {'<' if self.open_high else '<='} {self.high:g}"


def bound_rule(key: str, bound: Bound) -> Rule:
    """The rule that a key's value lies within a bound."""
    return Rule(
        name=f"{key}_in_bounds",
        keys=(key,),
        holds=lambda config, _: bound.contains(to_flat(config)[key]),
        text=f"{key} must be {bound}",
        remedy=f"Set {key} inside the bound",
    )


class RuleBook:
    """A list of rules that refuses two of one name; tables of rules register theirs by decorator."""

    def __init__(self, rules: Iterable[Rule] = ()) -> None:
        self._rules: dict[str, Rule] = {}
        for rule in rules:
            self.add(rule)

    def __iter__(self) -> Iterator[Rule]:
        return iter(self._rules.values())

    def __len__(self) -> int:
        return len(self._rules)

    def add(self, rule: Rule) -> None:
        """Append a rule."""
        assert rule.name not in self._rules, f"two rules are named {rule.name}"
        self._rules[rule.name] = rule

    def rule(
        self, *keys: str, text: str, remedy: str, needs: str | None = None
    ) -> Callable[[Predicate], Predicate]:
        """Register the decorated predicate, true where the rule holds, under its function name."""

        def register(holds: Predicate) -> Predicate:
            name = holds.__name__
            self.add(Rule(name=name, keys=keys, holds=holds, text=text, remedy=remedy, needs=needs))
            return holds

        return register


def broken(
    config: PretrainConfig, machine: Machine, *, bounds: RuleBook, relations: Iterable[RuleBook]
) -> list[Rule]:
    """Every rule that the configuration breaks, in order of definition."""
    out_of_bounds = [rule for rule in bounds if not rule.holds(config, machine)]
    bad_keys = {key for rule in out_of_bounds for key in rule.keys}
    found = list(out_of_bounds)
    for rule in (rule for book in relations for rule in book):
        unknown = rule.needs is not None and getattr(machine, rule.needs) is None
        if not unknown and bad_keys.isdisjoint(rule.keys) and not rule.holds(config, machine):
            found.append(rule)
    return found


def report(problems: Sequence[str]) -> ConfigError:
    """One error that lists every problem."""
    if len(problems) == 1:
        return ConfigError(problems[0])
    lines = [f"{number}. {problem}" for number, problem in enumerate(problems, start=1)]
    return ConfigError("\n".join([f"{len(problems)} problems in the configuration:", *lines]))
