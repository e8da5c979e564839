"""A pool of receive buffers: reusing memory avoids a page fault every 4 KiB."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

_Key = tuple[tuple[int, ...], torch.dtype, torch.device]


MAX_SHAPES = 64
"""Shapes whose free tensors are kept. A schedule needs fewer than ten for one sequence length."""


class BufferPool:
    """Free tensors by shape, dtype and device. A pool serves one stream of calls; it is not thread-safe.

    Tensors of the least recently used shapes are dropped, so that changing lengths do not fill the memory.
    """

    def __init__(self) -> None:
        self._free: OrderedDict[_Key, list[Tensor]] = OrderedDict()

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous, uninitialised tensor."""
        free = self._free.get((shape, dtype, device))
        return free.pop() if free else torch.empty(shape, dtype=dtype, device=device)

    def give(self, tensor: Tensor) -> None:
        """Return a tensor from :meth:`take` that is no longer read or written."""
        key = (tuple(tensor.shape), tensor.dtype, tensor.device)
        self._free.setdefault(key, []).append(tensor)
        self._free.move_to_end(key)
        if len(self._free) > MAX_SHAPES:
            self._free.popitem(last=False)
