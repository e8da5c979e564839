"""Looks at a pickle without executing it: only opcodes that plain data needs, within bounds.

An unpickler that resolves no dangerous name still obeys the file. A tuple nested a million times overflows the C stack,
and a memo index of 2^30 in five bytes takes gigabytes. What passes here is safe to build.
"""

from __future__ import annotations

import pickletools
from typing import Any

MAX_BYTES = 1 << 30
MAX_DEPTH = 100
"""Of containers within containers; tables of contents have about five."""
_MAX_NUMBER_BYTES = 16

_CONTENT = frozenset(
    {
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG1",
        "INT",
        "LONG",
        "BINFLOAT",
        "FLOAT",
        "SHORT_BINUNICODE",
        "BINUNICODE",
        "BINUNICODE8",
        "UNICODE",
        "SHORT_BINBYTES",
        "BINBYTES",
        "BINBYTES8",
        "SHORT_BINSTRING",
        "BINSTRING",
        "STRING",
        "GLOBAL",
        "EMPTY_TUPLE",
        "EMPTY_LIST",
        "EMPTY_DICT",
        "EMPTY_SET",
    }
)
"""Push one value."""
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_TO_MARK = frozenset({"TUPLE", "LIST", "DICT", "FROZENSET"})
"""Make one value of everything behind the mark."""
_INTO = {"APPEND": 1, "SETITEM": 2, "BUILD": 1}
"""Put so many values into the one below them."""
_INTO_TO_MARK = frozenset({"APPENDS", "SETITEMS", "ADDITEMS"})
_CALLS = frozenset({"REDUCE", "NEWOBJ", "STACK_GLOBAL"})
"""Make one value of two."""
_STORES = frozenset({"MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"})
_LOADS = frozenset({"GET", "BINGET", "LONG_BINGET"})
_MARK = -1


class _Scan:
    """The unpickler's stack, with the depth of each value in its place."""

    def __init__(self) -> None:
        self._stack: list[int] = []
        self._memo: dict[int, int] = {}

    def step(self, name: str, argument: Any, has_storages: bool) -> None:
        """Raises ValueError for an opcode that is not allowed, IndexError for one without its operands."""
        if name in _CONTENT:
            _check_number(name, argument)
            self._stack.append(0)
        elif name == "MARK":
            self._stack.append(_MARK)
        elif name in _TUPLES or name in _CALLS:
            self._push(1 + max(self._pop(_TUPLES.get(name, 2))))
        elif name in _TO_MARK:
            self._push(1 + max(self._pop_to_mark(), default=0))
        elif name in _INTO:
            self._into(self._pop(_INTO[name]))
        elif name in _INTO_TO_MARK:
            self._into(self._pop_to_mark())
        elif name in _STORES:
            self._store(argument)
        elif name in _LOADS:
            self._stack.append(self._memo[int(argument)])
        elif name == "BINPERSID" and has_storages:
            self._push(self._pop(1)[0])
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"the opcode {name} is not among those of plain data")

    def _push(self, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        self._stack.append(depth)

    def _into(self, contents: list[int]) -> None:
        container = self._pop(1)[0]
        self._push(max([container, *(1 + depth for depth in contents)]))

    def _store(self, argument: Any) -> None:
        index = len(self._memo) if argument is None else int(argument)
        if not 0 <= index <= len(self._memo):
            raise ValueError(f"it numbers an object {index} after {len(self._memo)} others")
        self._memo[index] = self._stack[-1]

    def _pop(self, count: int) -> list[int]:
        found = [self._stack.pop() for _ in range(count)]
        if _MARK in found:
            raise ValueError("a mark is in the place of a value")
        return found

    def _pop_to_mark(self) -> list[int]:
        found = []
        while (depth := self._stack.pop()) != _MARK:
            found.append(depth)
        return found


def check_pickle(data: bytes, *, has_storages: bool = False) -> None:
    """Raise ValueError, with the reason, unless a pickle is plain data within bounds.

    Args:
        data: the pickle.
        has_storages: whether it may refer to tensors that are stored beside it.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has {len(data)} bytes, and a table of contents has at most {MAX_BYTES}")
    scan = _Scan()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            scan.step(opcode.name, argument, has_storages)
    except (IndexError, KeyError) as error:
        raise ValueError("it takes values that are not there") from error


def _check_number(name: str, argument: Any) -> None:
    if isinstance(argument, int) and argument.bit_length() > 8 * _MAX_NUMBER_BYTES:
        raise ValueError(f"{name} is a number of {argument.bit_length()} bits")
