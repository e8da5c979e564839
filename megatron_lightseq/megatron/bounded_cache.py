"""A cache that keeps its most recently used entries only, so that variable lengths and masks cannot fill memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass
from typing import Any, Generic, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

MAX_BYTES = 128 * 2**20
"""Bytes of tensors that a cache holds, unless its newest entry alone is larger."""


class BoundedCache(Generic[Key, Value]):
    """At most ``max_entries`` values by key, and ``max_bytes`` of tensors in them.

    The least recently used value is dropped first, and the newest one never.
    """

    def __init__(self, max_entries: int, max_bytes: int = MAX_BYTES) -> None:
        assert max_entries > 0
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._bytes = 0
        self._entries: OrderedDict[Key, Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def held_bytes(self) -> int:
        """Bytes of tensors in all values."""
        return self._bytes

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value of ``key``, made now if it is not there."""
        if key not in self._entries:
            self._entries[key] = make()
            self._bytes += tensor_bytes(self._entries[key])
            while len(self._entries) > 1 and self._is_full():
                _, dropped = self._entries.popitem(last=False)
                self._bytes -= tensor_bytes(dropped)
        self._entries.move_to_end(key)
        return self._entries[key]

    def _is_full(self) -> bool:
        return len(self._entries) > self._max_entries or self._bytes > self._max_bytes


def tensor_bytes(value: Any) -> int:
    """Bytes of the tensors in a value: a tensor, or a tuple, list or dataclass of such values."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, tuple | list):
        return sum(map(tensor_bytes, value))
    if is_dataclass(value) and not isinstance(value, type):
        return sum(tensor_bytes(getattr(value, each.name)) for each in fields(value))
    return 0
