"""A pool of receive buffers: reusing memory avoids a page fault every 4 KiB."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor

_Key = tuple[int, torch.device, int]

CLASSES_PER_OCTAVE = 8
"""Block sizes between a number of bytes and its double: at most an eighth of a block is unused."""
SMALLEST_BLOCK = 512
"""Bytes."""


class BufferPool:
    """Free blocks of memory by size, device and CUDA stream. It is not thread-safe.

    Free blocks never hold more bytes than were in use at one time: sequence lengths and masks may change with every
    call, and memory stays flat. The blocks of the sizes that have not been used for longest are dropped first.
    """

    def __init__(self) -> None:
        self._free: OrderedDict[_Key, list[Tensor]] = OrderedDict()
        self._free_bytes = 0
        self._used_bytes = 0
        self._most_used_bytes = 0

    @property
    def free_bytes(self) -> int:
        """Bytes of free blocks that the pool holds."""
        return self._free_bytes

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were in use at one time: free blocks never hold more."""
        return self._most_used_bytes

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous, uninitialised tensor."""
        num_bytes = math.prod(shape) * dtype.itemsize
        block = self._block(_block_size(num_bytes), device)
        return block[:num_bytes].view(dtype).view(shape)

    def give(self, tensor: Tensor) -> None:
        """Return a tensor from :meth:`take` that is no longer read or written."""
        storage = tensor.untyped_storage()
        with torch.inference_mode(False):  # as for new blocks
            block = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        size = storage.nbytes()
        self._used_bytes -= size
        key = _key(size, tensor.device)
        self._free.setdefault(key, []).append(block)
        self._free.move_to_end(key)
        self._free_bytes += size
        while self._free_bytes > self._most_used_bytes:
            self._drop_oldest()

    def _block(self, size: int, device: torch.device) -> Tensor:
        free = self._free.get(_key(size, device))
        self._used_bytes += size
        self._most_used_bytes = max(self._most_used_bytes, self._used_bytes)
        if free:
            self._free_bytes -= size
            return free.pop()
        with torch.inference_mode(
            False
        ):  # a block outlives the call, and inference tensors cannot be written later
            return torch.empty(size, dtype=torch.uint8, device=device)

    def _drop_oldest(self) -> None:
        key, blocks = next(iter(self._free.items()))
        if blocks:
            blocks.pop()
            self._free_bytes -= key[0]
        if not blocks:
            del self._free[key]


def _key(size: int, device: torch.device) -> _Key:
    """What a block may be used again for: work on another stream might still read it."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return size, device, stream


def _block_size(num_bytes: int) -> int:
    """The smallest block that holds ``num_bytes``."""
    if num_bytes <= SMALLEST_BLOCK:
        return SMALLEST_BLOCK
    grain = (1 << (num_bytes - 1).bit_length() - 1) // CLASSES_PER_OCTAVE
    return -(-num_bytes // grain) * grain
