"""Copies of tensors in host memory that is allocated once: page faults would cost more than copying."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class HostCopies:
    """Buffers for one set of tensors after another, of the same shapes and dtypes."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []

    def of(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies on the host, which are complete when this returns, and valid until the next call."""
        if [_form(x) for x in tensors] != [_form(x) for x in self._buffers]:
            self._buffers = [_buffer_like(x) for x in tensors]
        with torch.no_grad():
            for buffer, tensor in zip(self._buffers, tensors, strict=True):
                buffer.copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors):
            torch.cuda.current_stream().synchronize()
        return self._buffers


def _form(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _buffer_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
