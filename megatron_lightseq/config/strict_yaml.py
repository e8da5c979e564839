"""YAML for configuration files: a safe subset with the scalars that people expect (YAML 1.2).

PyYAML reads YAML 1.1, where `off` is False, `1e-4` is a string, `010` is eight and `1:30` is ninety; it keeps the
last of two equal keys, and expands aliases without limit. Here scalars follow the YAML 1.2 core schema, and what a
flat configuration never needs is refused: duplicate keys, aliases, tags that build objects, deep nesting, several
documents, files over 100 kB or 1000 keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from megatron_lightseq.errors import ConfigError, explain

MAX_BYTES = 100_000
MAX_KEYS = 1000
MAX_DEPTH = 4
_TAG = "tag:yaml.org,2002:"
_SCALARS: tuple[tuple[str, str, str], ...] = (
    # tag, pattern, possible first characters
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
)


class Entry(NamedTuple):
    """A value and, for messages, the place where it was written."""

    value: Any
    origin: str


class _RefusedError(yaml.MarkedYAMLError):
    def __init__(self, problem: str, mark: Any) -> None:
        super().__init__(problem=problem, problem_mark=mark)


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {"": [(_TAG + "null", re.compile(r"^$"))]}
    for name, pattern, first_characters in _SCALARS:
        for character in first_characters:
            table.setdefault(character, []).append((_TAG + name, re.compile(rf"^(?:{pattern})$")))
    return table


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars, no aliases and bounded depth."""

    yaml_implicit_resolvers = _resolvers()
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _RefusedError(f"alias *{event.anchor} is refused", event.start_mark)
        if self._depth >= MAX_DEPTH:
            raise _RefusedError(f"nesting is deeper than {MAX_DEPTH}", event.start_mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


class _Dumper(yaml.SafeDumper):
    """Quotes exactly those strings that :class:`_Loader` would not read as strings."""

    yaml_implicit_resolvers = _resolvers()


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(str(loader.construct_scalar(node)))


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(re.sub(r"\.(inf|nan)", r"\1", str(loader.construct_scalar(node)).lower()))


_Loader.add_constructor(_TAG + "int", _construct_int)
_Loader.add_constructor(_TAG + "float", _construct_float)


def parse_scalar(text: str) -> Any:
    """One value as written after a flag or a colon; raises yaml.YAMLError, as jsonargparse expects of a loader."""
    return yaml.load(text, Loader=_Loader)  # a SafeLoader, which builds no objects


def dump_scalar(value: Any) -> str:
    """One value on one line, which :func:`parse_scalar` reads back."""
    items = value if isinstance(value, list) else [value]
    readable = all(
        str(item).isprintable() for item in items
    )  # else escaped, because PyYAML reads U+0085 as a blank
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10**9, allow_unicode=readable)
    return text.removesuffix("\n").removesuffix("\n...")


def read_yaml(path: Path) -> dict[str, Entry]:
    """The entries of a flat YAML mapping; `-` in a key means `_`. Raises ConfigError with file and line."""
    return parse_mapping(_read_text(path), str(path))


def parse_mapping(text: str, name: str) -> dict[str, Entry]:
    """The entries of a flat YAML mapping given as text; messages call the file `name`."""
    try:
        return _entries(_Loader(text), name)
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an integer of thousands of digits
        raise _unreadable(name, error) from error


def _entries(loader: _Loader, name: str) -> dict[str, Entry]:
    root = loader.get_single_node()
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise _RefusedError("the top level is not a mapping", root.start_mark)
    entries: dict[str, Entry] = {}
    if len(root.value) > MAX_KEYS:
        raise _RefusedError(
            f"there are {len(root.value)} keys, and at most {MAX_KEYS} are read", root.start_mark
        )
    for key_node, value_node in root.value:
        origin = f"{name} line {key_node.start_mark.line + 1}"
        key = _checked_key(loader.construct_object(key_node, deep=True), entries, origin)
        entries[key] = Entry(loader.construct_object(value_node, deep=True), origin)
    return entries


def _checked_key(key: object, seen: Mapping[str, Entry], origin: str) -> str:
    if not isinstance(key, str):
        raise ConfigError(
            explain(
                got=f"{origin} has the key {key!r}", rule="a key must be a name", remedy="Remove the line"
            )
        )
    key = key.replace("-", "_")
    if key in seen:
        raise ConfigError(
            explain(
                got=f"{key} is given at {seen[key].origin} and again at {origin}",
                rule="a key may appear only once per file",
                remedy="Remove one of the two lines",
            )
        )
    return key


def _read_text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ConfigError(
                explain(
                    got=f"{path} has {size} bytes",
                    rule=f"a configuration file has at most {MAX_BYTES}",
                    remedy="Give the path of a configuration file",
                )
            )
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _unreadable(str(path), error) from error
    except OSError as error:
        raise ConfigError(
            explain(
                got=f"{path} cannot be read ({error.strerror})",
                rule="a configuration is a readable YAML file",
                remedy="Check the path, for example configs/gpt_stdlib.yaml",
            )
        ) from error


def _unreadable(name: str, error: Exception) -> ConfigError:
    mark = getattr(error, "problem_mark", None)
    where = f"{name} line {mark.line + 1}, column {mark.column + 1}" if mark is not None else name
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    remedy = "Use spaces instead of tabs" if "\\t" in problem else "Write one `key: value` per line"
    return ConfigError(
        explain(got=f"{where}: {problem}", rule="a configuration is flat, plain YAML", remedy=remedy)
    )
