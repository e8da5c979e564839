"""Receive buffers that are used again: fresh memory costs a page fault every 4 KiB."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

_Key = tuple[tuple[int, ...], torch.dtype, torch.device]


class BufferPool:
    """Free tensors by shape, dtype and device. One pool serves one stream of calls; it is not thread-safe."""

    def __init__(self) -> None:
        self._free: defaultdict[_Key, list[Tensor]] = defaultdict(list)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous tensor with arbitrary contents."""
        free = self._free[shape, dtype, device]
        return free.pop() if free else torch.empty(shape, dtype=dtype, device=device)

    def give(self, tensor: Tensor) -> None:
        """Hand back a tensor from :meth:`take` that nothing reads or writes any more."""
        self._free[tuple(tensor.shape), tensor.dtype, tensor.device].append(tensor)
