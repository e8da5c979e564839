"""Rules between configuration keys: named, enumerable, and reported together.

Every rule says what must hold; its message gives the values, the rule and the remedy. A rule either states its
condition here (:meth:`RuleSet.rule`) or asks the part of the package that knows it (:meth:`RuleSet.check`), so that
no condition is written twice. Rules on a single number (bounds) come first, and a rule whose keys are out of bounds is
skipped, so that one mistake gives one message.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_lightseq.config.flat import to_flat, value_of
from megatron_lightseq.config.sections import PretrainConfig
from megatron_lightseq.errors import ConfigError, LightSeqError


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What a run finds on its machines; None means unknown, and rules that need an unknown fact are skipped."""

    world_size: int | None = None
    """Number of ranks that torchrun starts."""
    num_gpus: int | None = None
    """Number of CUDA devices visible on this host."""
    has_transformer_engine: bool | None = None
    """Whether Transformer Engine is installed."""
    has_flash_attn: bool | None = None
    """Whether the flash-attn package is installed."""


Predicate = Callable[[PretrainConfig, Machine], bool]
Check = Callable[[PretrainConfig, Machine], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One condition on a configuration."""

    name: str
    """Unique; tests have one failing configuration per name."""
    keys: tuple[str, ...]
    """The keys whose values the message shows."""
    complaint: Callable[[PretrainConfig, Machine], str | None]
    """What is wrong and what to do about it; None where the rule holds."""
    needs: str | None = None
    """The field of :class:`Machine` without which the rule cannot be checked."""

    def message(self, config: PretrainConfig, machine: Machine) -> str | None:
        """Values, rule and remedy where the configuration breaks the rule; None where it holds."""
        complaint = self.complaint(config, machine)
        if complaint is None:
            return None
        shown = [f"{key} {_shown(value_of(config, key))}" for key in self.keys]
        if self.needs is not None:
            shown.append(f"{self.needs.replace('_', ' ')} {_shown(getattr(machine, self.needs))}")
        return f"{', '.join(shown)}: {complaint}"


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
    """Whether `low` itself is out of bounds."""
    open_high: bool = True
    """Whether `high` itself is out of bounds; infinity always is."""

    def contains(self, value: float | None) -> bool:
        """Whether the value is in bounds; NaN never is."""
        if value is None:
            return True
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        if self.low == -math.inf:
            return "a finite number"
        low = f"{'>' if self.open_low else '>='} {_in_words(self.low)}"
        if self.high == math.inf:
            return f"a finite number {low}"
        return f"{low} and {'<' if self.open_high else '<='} {_in_words(self.high)}"


def _in_words(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


class RuleSet:
    """An ordered set of rules with unique names; rules register themselves by decorator."""

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

    def rule(self, *keys: str, remedy: str, needs: str | None = None) -> Callable[[Predicate], Predicate]:
        """Register the decorated predicate, true where the rule holds, under its function name.

        Its docstring says what must hold, as the message will: one sentence that begins in lower case.

        Args:
            keys: whose values the message shows.
            remedy: what to do; `{key}` stands for a key's value, `{world_size}` and `{num_gpus}` for the machine's.
            needs: the field of :class:`Machine` without which the rule is skipped.
        """

        def register(holds: Predicate) -> Predicate:
            text = " ".join((inspect.getdoc(holds) or "").split())

            def complaint(config: PretrainConfig, machine: Machine) -> str | None:
                if holds(config, machine):
                    return None
                facts = {**to_flat(config), "world_size": machine.world_size, "num_gpus": machine.num_gpus}
                return f"{text} {remedy.format_map(facts)}."

            self.add(Rule(name=holds.__name__, keys=keys, complaint=complaint, needs=needs))
            return holds

        return register

    def check(self, *keys: str, needs: str | None = None) -> Callable[[Check], Check]:
        """Register the decorated function, which raises a LightSeqError where the rule is broken.

        For conditions that another part of the package knows and words itself; `keys` and `needs` as in :meth:`rule`.
        """

        def register(check: Check) -> Check:
            def complaint(config: PretrainConfig, machine: Machine) -> str | None:
                try:
                    check(config, machine)
                except LightSeqError as error:
                    return str(error)
                return None

            self.add(Rule(name=check.__name__, keys=keys, complaint=complaint, needs=needs))
            return check

        return register


def bound_rule(key: str, bound: Bound) -> Rule:
    """The rule that a key's value lies within a bound."""

    def complaint(config: PretrainConfig, _: Machine) -> str | None:
        if bound.contains(value_of(config, key)):
            return None
        return f"{key} must be {bound}. Set {key} to a value in bounds."

    return Rule(name=f"{key}_in_bounds", keys=(key,), complaint=complaint)


def find_violations(
    config: PretrainConfig,
    machine: Machine,
    *,
    bounds: RuleSet,
    relations: Iterable[RuleSet],
    checked: Machine | None = None,
) -> list[str]:
    """A message for every rule that the configuration breaks, in order of definition.

    Args:
        config: to check.
        machine: what is known of it.
        bounds: rules on one key each; a key that breaks its rule is left out of all others.
        relations: rules between keys.
        checked: what was known when the rules were checked before; rules that could be checked then are skipped.
    """
    found: list[str] = []
    out_of_bounds: set[str] = set()
    for rule in () if checked is not None else bounds:
        message = rule.message(config, machine)
        if message is not None:
            found.append(message)
            out_of_bounds.update(rule.keys)
    for rule in (rule for rule_set in relations for rule in rule_set):
        if not _is_due(rule, machine, checked) or not out_of_bounds.isdisjoint(rule.keys):
            continue
        message = rule.message(config, machine)
        if message is not None:
            found.append(message)
    return found


def _is_due(rule: Rule, machine: Machine, checked: Machine | None) -> bool:
    """Whether a rule can be checked now, and could not be checked before."""
    if rule.needs is None:
        return checked is None
    known_before = checked is not None and getattr(checked, rule.needs) is not None
    return getattr(machine, rule.needs) is not None and not known_before


def report(problems: Sequence[str]) -> ConfigError:
    """One error that lists every problem."""
    if len(problems) == 1:
        return ConfigError(problems[0])
    lines = [f"{number}. {problem}" for number, problem in enumerate(problems, start=1)]
    return ConfigError("\n".join([f"{len(problems)} problems in the configuration:", *lines]))
