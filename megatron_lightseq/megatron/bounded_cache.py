"""A cache that keeps its most recently used entries only, so that variable lengths and masks cannot fill memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class BoundedCache(Generic[Key, Value]):
    """At most ``max_entries`` values by key; the least recently used one is dropped first."""

    def __init__(self, max_entries: int) -> None:
        assert max_entries > 0
        self._max_entries = max_entries
        self._entries: OrderedDict[Key, Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value of ``key``, made now if it is not there."""
        if key not in self._entries:
            self._entries[key] = make()
            if len(self._entries) > self._max_entries:
                self._entries.popitem(last=False)
        self._entries.move_to_end(key)
        return self._entries[key]
