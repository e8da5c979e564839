"""Patterns over layers, as Megatron writes them: every n-th layer, or one 0 or 1 for each layer.

Megatron-LM evaluates texts such as ``([0]+[1]*26)`` as Python. Here they are read as arithmetic on lists: brackets,
``+`` and ``*`` with whole numbers, and nothing else. Standard library only.
"""

from __future__ import annotations

import ast

LayerPattern = int | tuple[int, ...]
"""``n`` for every n-th layer, or one 0 or 1 for each layer."""

MAX_LAYERS = 10_000
"""Entries of the longest pattern that is read; the text ``[1]*10**9`` would take gigabytes."""


def parse_pattern(text: str) -> LayerPattern:
    """The pattern that a text stands for.

    Raises:
        ValueError: it is neither a whole number nor a sum of lists of whole numbers.
    """
    try:
        value = _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(text) from error
    return tuple(value) if isinstance(value, list) else value


def is_marked(pattern: LayerPattern | None, number: int, *, every: int = 0) -> bool:
    """Whether a pattern marks a layer, counted from 1; layers beyond a list are treated like its last one.

    Args:
        pattern: to read; None marks no layer.
        number: of the layer.
        every: of ``n`` layers in a row, the one that the number n marks, counted from 0; -1 for the last one.
    """
    if pattern is None:
        return False
    if isinstance(pattern, int):
        return (number - 1) % pattern == every % pattern
    return bool(pattern[min(number, len(pattern)) - 1])


def spelled_out(pattern: LayerPattern, num_layers: int, *, every: int = 0) -> list[int]:
    """One 0 or 1 for each of ``num_layers`` layers; ``every`` as in :func:`is_marked`."""
    return [int(is_marked(pattern, number, every=every)) for number in range(1, num_layers + 1)]


def _value(node: ast.expr) -> int | list[int]:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.List | ast.Tuple):
        return [_number(_value(item)) for item in node.elts]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _list(_value(node.left)) + _list(_value(node.right))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return _repeated(_value(node.left), _value(node.right))
    raise ValueError(ast.dump(node))


def _repeated(left: int | list[int], right: int | list[int]) -> list[int]:
    items, times = (left, right) if isinstance(left, list) else (right, left)
    if _number(times) * len(_list(items)) > MAX_LAYERS:
        raise ValueError(f"more than {MAX_LAYERS} layers")
    return _list(items) * _number(times)


def _list(value: int | list[int]) -> list[int]:
    if isinstance(value, list):
        return value
    raise ValueError(value)


def _number(value: int | list[int]) -> int:
    if isinstance(value, int):
        return value
    raise ValueError(value)
