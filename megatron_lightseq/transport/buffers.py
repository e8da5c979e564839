"""Receive buffers that are used again: fresh memory costs a page fault every 4 KiB."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

_Key = tuple[tuple[int, ...], torch.dtype, torch.device]


MAX_SHAPES = 64
"""Shapes whose free tensors are kept; a schedule of one sequence length needs fewer than ten."""


class BufferPool:
    """Free tensors by shape, dtype and device. One pool serves one stream of calls; it is not thread-safe.

    Tensors of the shapes that were used longest ago are given up, so that ever new lengths do not fill the memory.
    """

    def __init__(self) -> None:
        self._free: OrderedDict[_Key, list[Tensor]] = OrderedDict()

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous tensor with arbitrary contents."""
        free = self._free.get((shape, dtype, device))
        return free.pop() if free else torch.empty(shape, dtype=dtype, device=device)

    def give(self, tensor: Tensor) -> None:
        """Hand back a tensor from :meth:`take` that nothing reads or writes any more."""
        key = (tuple(tensor.shape), tensor.dtype, tensor.device)
        self._free.setdefault(key, []).append(tensor)
        self._free.move_to_end(key)
        if len(self._free) > MAX_SHAPES:
            self._free.popitem(last=False)
