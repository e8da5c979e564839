"""A ledger of tensors: what is held, by what it is for, at every moment of a run of torch code.

Works with real tensors and with fake ones, which have sizes and no memory (``torch._subclasses.FakeTensorMode``).
What a tensor is for is read from the Python functions that are active when it is created (:data:`PURPOSES`).
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Holdings = dict[str, int]
"""Bytes by purpose."""


@dataclass(slots=True)
class Moment:
    """The largest sum of bytes held during one phase, and what it consisted of."""

    total: int = 0
    by_purpose: Holdings = field(default_factory=dict)


class Ledger(TorchDispatchMode):
    """Counts the bytes of every storage that is created while the mode is active, until it is freed.

    A storage counts for one purpose: the one that ``purpose_of`` names when it is created.
    """

    def __init__(self, purpose_of: Callable[[FrameType], str]) -> None:
        super().__init__()
        self._purpose_of = purpose_of
        self._held: Counter[str] = Counter()
        self._total = 0
        self._entries: dict[int, tuple[str, int, weakref.ref[Any]]] = {}
        self._phase = ""
        self.peaks: dict[str, Moment] = {}
        """By phase."""

    @property
    def held(self) -> Holdings:
        """Bytes that are held now, by purpose."""
        return {purpose: count for purpose, count in self._held.items() if count}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase whose peak is kept under ``name``, together with those of the same name; phases may be nested."""
        before, self._phase = self._phase, name
        self._note_peak()
        try:
            yield
        finally:
            self._phase = before

    @contextmanager
    def resizing(self) -> Iterator[None]:
        """Count storages again that are resized in place: Megatron empties outputs that it recomputes."""
        original = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = original(storage, size)
            self._recount(storage, size)
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self._enter(result)
        elif result is not None:
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self._enter(leaf)
        return result

    def adopt(self, tensor: torch.Tensor, purpose: str) -> None:
        """Count an existing tensor's storage for ``purpose``, whatever it counted for before."""
        storage = tensor.untyped_storage()
        self._enter(tensor)
        known = self._entries.get(id(storage))
        if known is not None:
            self._held[known[0]] -= known[1]
            self._held[purpose] += known[1]
            self._entries[id(storage)] = (purpose, known[1], known[2])

    def _enter(self, tensor: torch.Tensor) -> None:
        if tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._entries.get(key)
        if known is not None and known[2]() is storage:
            return
        size = storage.nbytes()
        if size == 0:
            return
        purpose = self._purpose_of(sys._getframe(2))

        def leave(_: Any) -> None:
            entry = self._entries.pop(key, None)
            if entry is not None:
                self._held[entry[0]] -= entry[1]
                self._total -= entry[1]

        self._entries[key] = (purpose, size, weakref.ref(storage, leave))
        self._held[purpose] += size
        self._total += size
        self._note_peak()

    def _recount(self, storage: torch.UntypedStorage, size: int) -> None:
        entry = self._entries.get(id(storage))
        if entry is None:
            return
        purpose, before, reference = entry
        self._entries[id(storage)] = (purpose, size, reference)
        self._held[purpose] += size - before
        self._total += size - before
        self._note_peak()

    def _note_peak(self) -> None:
        moment = self.peaks.setdefault(self._phase, Moment())
        if self._total > moment.total:
            moment.total, moment.by_purpose = self._total, self.held
