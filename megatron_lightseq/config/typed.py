"""The type of every key, from which jsonargparse converts values, refuses them and writes the help."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from functools import cache, lru_cache
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import yaml

from megatron_lightseq.config.choices import DerivedChoices
from megatron_lightseq.config.flat import field_of_key, from_flat, section_of_key, section_types, to_flat
from megatron_lightseq.config.layer_pattern import LayerPattern, parse_pattern
from megatron_lightseq.config.names import nearest
from megatron_lightseq.config.strict_yaml import Entry, dump_scalar, parse_scalar
from megatron_lightseq.errors import explain

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

_LOADER = "lightseq-strict-yaml"
_PLURAL = {int: "integers", float: "numbers"}
_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


@cache
def _annotations() -> dict[str, Any]:
    hints = {name: get_type_hints(cls, include_extras=True) for name, cls in section_types().items()}
    return {key: hints[section][key] for key, section in section_of_key().items()}


def _derived_choices(annotation: Any) -> DerivedChoices | None:
    marks = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    return next((mark for mark in marks if isinstance(mark, DerivedChoices)), None)


def key_type(key: str) -> Any:
    """The type of a key; derived choices are the Literal of their present words."""
    annotation = _annotations()[key]
    derived = _derived_choices(annotation)
    return annotation if derived is None else Literal.__getitem__(derived.words())


def key_types() -> dict[str, Any]:
    """The type of every key."""
    return {key: key_type(key) for key in _annotations()}


def is_switch(key: str) -> bool:
    """Whether a key is a boolean, whose flag needs no value."""
    return _annotations()[key] is bool


def is_list(key: str) -> bool:
    """Whether a key takes several values."""
    return get_origin(_annotations()[key]) is tuple


def is_pattern(key: str) -> bool:
    """Whether a key takes a pattern over layers: a number, a list, or a text that stands for one of them."""
    return set(get_args(LayerPattern)) <= set(_alternatives(_annotations()[key]))


def takes_null(key: str) -> bool:
    """Whether a key may be null."""
    return NoneType in _alternatives(key_type(key))


def choices(key: str) -> tuple[str, ...]:
    """The words that a key may be set to; empty if its values are not a fixed list of words."""
    return tuple(
        choice
        for part in _alternatives(key_type(key))
        if get_origin(part) is Literal
        for choice in get_args(part)
    )


def describe(key: str) -> str:
    """The type of a key in words: `an integer or null`, `one of a, b`."""
    annotation = key_type(key)
    if is_list(key):
        (item, _) = get_args(annotation)
        if item in _PLURAL:
            return f"a list of {_PLURAL[item]}"
        return f"a list of {' | '.join(get_args(item)) if get_origin(item) is Literal else _WORDS[item]}"
    if is_pattern(key):
        return "an integer, or a list of 0 and 1" + (", or null" if takes_null(key) else "")
    parts = [part for part in _alternatives(annotation) if part is not NoneType]
    words = [
        f"one of {', '.join(get_args(part))}" if get_origin(part) is Literal else _WORDS[part]
        for part in parts
    ]
    return " or ".join([*words, "null"]) if takes_null(key) else " or ".join(words)


def parser() -> ArgumentParser:
    """A jsonargparse parser with one typed argument per key, grouped by section."""
    return _parser(tuple(key_types().items()))


@lru_cache(maxsize=2)  # for other choices, if a method has been registered in between
def _parser(types: tuple[tuple[str, Any], ...]) -> ArgumentParser:
    import jsonargparse  # 0.1 s, needed only where files or flags are read

    jsonargparse.set_loader(_LOADER, parse_scalar, (yaml.YAMLError,), json_superset=False)
    made = jsonargparse.ArgumentParser(
        prog="lightseq pretrain",
        usage="%(prog)s [CONFIG.yaml ...] [--key value ...]",
        exit_on_error=False,
        parser_mode=_LOADER,
    )
    made.add_argument("--print-config", action="store_true", help="Print the whole configuration and stop.")
    defaults = to_flat(from_flat({}))
    for name, cls in section_types().items():
        group = made.add_argument_group(name, inspect.getdoc(cls))
        texts = field_docstrings(cls)
        for key, key_type_ in ((key, type_) for key, type_ in types if section_of_key()[key] == name):
            group.add_argument(
                f"--{key.replace('_', '-')}", type=key_type_, default=defaults[key], help=texts[key]
            )
    return made


def field_docstrings(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass, with the explanation of derived choices."""
    (definition,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    found: dict[str, str] = {}
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            found[statement.target.id] = _text(following)
    for name, annotation in get_type_hints(cls, include_extras=True).items():
        derived = _derived_choices(annotation)
        if derived is not None:
            found[name] = f"{found[name]} {derived.explanation()}"
    return found


def coerce(entries: Mapping[str, Entry]) -> tuple[dict[str, Any], list[str]]:
    """Values converted to their types, and a message for every entry that does not have its key's type.

    Strings are read like flags, which always are strings; a boolean is never taken for a number, nor a fraction for
    an integer.
    """
    ready: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for key, entry in entries.items():
        try:
            ready[key] = _understood(key, entry.value)
        except (ValueError, yaml.YAMLError):
            problems[key] = _wrong_type(key, entry)
    try:  # one call for all is fast
        return _checked(ready), list(problems.values())
    except Exception:  # noqa: BLE001 - jsonargparse passes on whatever a converter raises
        values: dict[str, Any] = {}
    for key, value in ready.items():  # one by one finds every wrong value
        try:
            values.update(_checked({key: value}))
        except Exception:  # noqa: BLE001
            problems[key] = _wrong_type(key, entries[key])
    return values, [problems[key] for key in entries if key in problems]


def _checked(values: dict[str, Any]) -> dict[str, Any]:
    """Values as jsonargparse converts them; text is left alone, because jsonargparse would parse it again."""
    text = {key: value for key, value in values.items() if isinstance(value, str) and not choices(key)}
    others = {key: value for key, value in values.items() if key not in text}
    found = parser().parse_object(others, defaults=False)
    return {key: text[key] if key in text else getattr(found, key) for key in values}


def _understood(key: str, value: Any) -> Any:
    """A raw value as one of the key's type; raises ValueError or YAMLError if it cannot be one."""
    if is_list(key):
        item = get_args(_annotations()[key])[0]
        return _as_numbers(value, item) if item in _PLURAL else _as_list(value)
    if is_pattern(key):
        return _as_pattern(key, value)
    if value is None and "null" in choices(key):  # the word null is one of its choices
        return "null"
    if isinstance(value, str) and not choices(key) and str not in _alternatives(key_type(key)):
        value = parse_scalar(value)
        if isinstance(value, str):
            raise ValueError("text")
    if value is None and not takes_null(key):
        raise ValueError("null")
    return value


def _as_list(value: Any) -> Any:
    """A list of texts: numbers in it (weights of data prefixes) become text, and a single item needs no brackets."""
    items = value if isinstance(value, list | tuple) else [value]
    return [dump_scalar(item) if type(item) in (int, float) else item for item in items]


def _as_numbers(value: Any, item: type) -> list[Any]:
    """A list of numbers; flags may also be written as in Megatron-LM, `1023,0` or `(1023, 0)`."""
    items = value if isinstance(value, list | tuple) else [value]
    texts = [part for each in items for part in str(each).strip("()[] ").split(",")]
    return [item(text) for text in texts if text.strip() or len(texts) > 1]


def _as_pattern(key: str, value: Any) -> LayerPattern | None:
    """A pattern over layers from a number, a list, or Megatron-LM's way to write one, `([0]+[1]*26)`."""
    if value is None or (isinstance(value, str) and value.strip() == "null"):
        if not takes_null(key):
            raise ValueError("null")
        return None
    if isinstance(value, list | tuple):
        value = dump_scalar(list(value))
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(value)
    return value if isinstance(value, int) else parse_pattern(value)


def _wrong_type(key: str, entry: Entry) -> str:
    near = nearest(str(entry.value), choices(key))
    remedy = f"Perhaps {near} was meant" if near else f"Write, for example, {key}: {_example(key)}"
    return explain(
        got=f"{key} {entry.value!r} ({entry.origin})", rule=f"{key} must be {describe(key)}", remedy=remedy
    )


def _example(key: str) -> str:
    default = field_of_key(key).default
    if default is None:
        part = _alternatives(key_type(key))[0]
        return {int: "1", float: "1.0", str: "name"}.get(part) or next(iter(choices(key)), "[1, 0]")
    if is_list(key) and get_args(_annotations()[key])[0] in _PLURAL:
        return "[1, 0]"
    return dump_scalar(list(default) if isinstance(default, tuple) else default)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return (annotation,) if get_origin(annotation) in (Literal, tuple, None) else get_args(annotation)


def _text(statement: ast.stmt) -> str:
    is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return inspect.cleandoc(str(ast.literal_eval(ast.unparse(statement)))) if is_text else ""
