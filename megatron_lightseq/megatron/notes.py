"""Log lines about what LightSeq does differently from what was asked: once per process, from the first rank."""

from __future__ import annotations

import functools
import logging
import os

import torch.distributed as dist

_logger = logging.getLogger(__name__)


@functools.lru_cache(maxsize=64)
def note_once(text: str) -> None:
    """Log a line at level WARNING, unless it was logged before or this is not the first rank."""
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
    if rank == 0:
        _logger.warning(text)


def note_replaced_kernels(options: list[str]) -> None:
    """Note that options which select an attention kernel have no effect; nothing if there are none."""
    if options:
        note_once(
            f"LightSeq attention runs its own kernels, which cp_kernel selects; replaced: {', '.join(options)}"
        )
