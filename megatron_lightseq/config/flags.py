"""The command line of a run: configuration files, then flags that override them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_lightseq.config.flat import section_of_key
from megatron_lightseq.config.names import MEGATRON_SPELLINGS
from megatron_lightseq.config.strict_yaml import Entry
from megatron_lightseq.config.typed import is_list, is_switch, takes_null
from megatron_lightseq.errors import explain

COMMAND_LINE = "command line"
ACTIONS = ("help", "print_config")
NO_VALUE = "(no value)"
_SWITCH_WORDS = ("true", "false", "yes", "no", "on", "off", "1", "0", "null", "none")
"""Words after a switch that are taken as its value, not as a file; only true and false are then accepted."""


@dataclass(kw_only=True, slots=True)
class Invocation:
    """The contents of a command line, before any name or type is checked."""

    files: list[Path] = field(default_factory=list)
    """Configuration files, in order."""
    entries: dict[str, Entry] = field(default_factory=dict)
    """Values by key with underscores, including unknown keys. The last of two equal flags wins."""
    actions: set[str] = field(default_factory=set)
    """The requested :data:`ACTIONS`."""
    problems: list[str] = field(default_factory=list)
    """Messages about words that are not a flag, a file or a value."""


def read_flags(arguments: Sequence[str]) -> Invocation:
    """Sort a command line into files, values and actions; `--a-b v`, `--a_b v` and `--a-b=v` mean the same."""
    found = Invocation()
    position = 0
    while position < len(arguments):
        word = arguments[position]
        position += 1
        if word in ("-h", "--help"):
            found.actions.add("help")
        elif word.startswith("--") and len(word) > 2:
            position += _read_flag(word, arguments[position:], found)
        elif word.startswith("-"):
            found.problems.append(_stray(word))
        else:
            found.files.append(Path(word))
    return found


def _read_flag(word: str, following: Sequence[str], found: Invocation) -> int:
    """Enter one flag; returns how many of the following words were its values."""
    name, has_value, inline = word[2:].partition("=")
    key = name.replace("-", "_")
    if key in ACTIONS and not has_value:
        found.actions.add(key)
        return 0
    if _negates_switch(key):
        if has_value:
            found.problems.append(_no_value(word))
        _enter(key.removeprefix("no_"), "false", name, found)
        return 0
    values = [inline] if has_value else _values(key, following)
    if key == "config":
        found.files.extend(map(Path, values))
    else:
        _enter(key, _value(key, values), name, found)
    return 0 if has_value else len(values)


def _enter(key: str, value: object, name: str, found: Invocation) -> None:
    found.entries.pop(key, None)  # the last of two equal flags wins, at its own position
    found.entries[key] = Entry(value, f"{COMMAND_LINE}, --{name}")


def _negates_switch(key: str) -> bool:
    """Whether a key is `no_` before a switch; `no_load_optim` is not, because there is no `load_optim`."""
    positive = key.removeprefix("no_")
    return positive != key and positive in section_of_key() and is_switch(positive)


def _values(key: str, following: Sequence[str]) -> list[str]:
    """The words after a flag that are its values: at most one, or all up to the next flag for a list."""
    words: list[str] = []
    for word in following:
        if word.startswith("-") and not re.match(r"-[.\d]", word):
            break
        words.append(word)
    if key == "config":
        return words[:1]
    if key in MEGATRON_SPELLINGS and MEGATRON_SPELLINGS[key].refusal is None:
        return []
    if key not in section_of_key() or is_list(key):  # the values of an unknown flag are not files
        return words
    if is_switch(key):
        return [word for word in words[:1] if word.lower() in _SWITCH_WORDS]
    return words[:1]


def _value(key: str, values: list[str]) -> object:
    if key not in section_of_key():
        return values[0] if values else True
    if is_list(key):
        return values
    if not values:
        return True if is_switch(key) else NO_VALUE
    return None if takes_null(key) and values[0] == "null" else values[0]


def _stray(word: str) -> str:
    return explain(
        got=f"{word!r} on the command line",
        rule="a flag is two dashes and a name",
        remedy="Write --key value; --help lists the keys",
    )


def _no_value(word: str) -> str:
    return explain(
        got=f"{word} on the command line",
        rule="a negated switch takes no value",
        remedy=f"Write {word.partition('=')[0]}",
    )
