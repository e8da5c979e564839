"""Attention masks that are given as dense tensors: which :class:`~megatron_lightseq.mask.Mask` hides the same keys.

Megatron's dense masks are boolean, (B or 1, 1, S, S), and True where a key is hidden. Attention here computes masks in
which each query sees a few intervals of positions. A dense mask of that kind is recognised by its rows; any other is
refused, because attention would otherwise have to ignore it.

Shapes: S positions of the whole sequence, R rows (queries) that this rank holds.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.kernels.dense_mask import MOST_INTERVALS, mask_from_intervals, visible_intervals
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask

_ROWS_AT_A_TIME = 1024
"""Bounds temporary tensors to as many rows of a mask."""
_NO_INTERVALS = -1
_REMEMBERED = 8
"""Masks whose meaning is remembered: those of the micro-batches that a pipeline has in flight."""


def mask_from_hidden(hidden: Tensor) -> Mask | None:
    """The mask that hides the same keys as a dense one of Megatron's.

    Args:
        hidden: (..., S, S), bool, True where a key is hidden; all leading entries must be equal.

    Returns:
        None if leading entries differ, or if a query sees more separate intervals of keys than
        :func:`kernels.dense_mask.mask_from_dense` expresses.
    """
    return _mask_of(_intervals_of_rows(hidden))


def _intervals_of_rows(hidden: Tensor) -> Tensor:
    """(R, T, 2) int64: the intervals of keys that each row of (..., R, S) sees; -1 in rows for which there are none."""
    rows, length = hidden.shape[-2:]
    whole = hidden.reshape(-1, rows, length)
    blocks = [
        _intervals_of_block(whole[:, at : at + _ROWS_AT_A_TIME]) for at in range(0, rows, _ROWS_AT_A_TIME)
    ]
    return torch.cat(blocks)


def _intervals_of_block(hidden: Tensor) -> Tensor:
    intervals = visible_intervals(~hidden[0]) if bool((hidden == hidden[:1]).all()) else None
    if intervals is None:
        shape = (hidden.shape[1], MOST_INTERVALS, 2)
        return torch.full(shape, _NO_INTERVALS, dtype=torch.int64, device=hidden.device)
    return intervals


def _mask_of(intervals: Tensor) -> Mask | None:
    return None if bool((intervals == _NO_INTERVALS).any()) else mask_from_intervals(intervals)


@dataclass(frozen=True, slots=True)
class _Seen:
    """A mask that was read before: its memory, its view of it, and its meaning."""

    storage: StorageWeakRef
    view: tuple[Any, ...]
    mask: Mask | None


class DenseMasks:
    """Reads dense masks once: the layers of a model, and recomputation, get the same tensor again and again.

    Reading compares the whole tensor and waits for the device, and over several ranks it is collective; a mask that was
    read before costs neither. Weak references: no mask is kept alive.
    """

    def __init__(self) -> None:
        self._seen: deque[_Seen] = deque(maxlen=_REMEMBERED)

    @torch.compiler.disable
    def read(
        self, hidden: Tensor, layout: SequenceLayout, group: dist.ProcessGroup | None, *, causal: bool
    ) -> Mask:
        """The mask that equals a dense one.

        Args:
            hidden: (B or 1, 1, R, S) of this rank's queries, or (B or 1, 1, S, S) of all; bool, True where hidden.
            layout: which rank holds which queries.
            group: the context-parallel ranks; all of them call this with their own rows.
            causal: whether the layer must not see later tokens.

        Raises:
            UnsupportedError: on all ranks, if no mask says the same, or it shows later tokens to a causal layer.
        """
        mask = self._remembered(hidden)
        if mask is None:
            mask = _read(hidden, layout, group)
            if not hidden.is_inference():  # whose changes in place cannot be noticed
                self._seen.append(_Seen(StorageWeakRef(hidden.untyped_storage()), _view(hidden), mask))
        if mask is None or (causal and not mask.is_causal):
            raise _not_understood(hidden, "none of these" if mask is None else f"{mask}, in a causal layer")
        return mask

    def _remembered(self, hidden: Tensor) -> Mask | None:
        if hidden.is_inference():
            return None
        address, view = hidden.untyped_storage()._cdata, _view(hidden)
        for seen in self._seen:
            if seen.storage.cdata == address and not seen.storage.expired() and seen.view == view:
                return seen.mask
        return None


def _view(hidden: Tensor) -> tuple[Any, ...]:
    return hidden._version, hidden.storage_offset(), hidden.shape, hidden.stride(), hidden.dtype


def _read(hidden: Tensor, layout: SequenceLayout, group: dist.ProcessGroup | None) -> Mask | None:
    rows, length = hidden.shape[-2:] if hidden.dim() >= 2 else (0, 0)
    if hidden.dtype != torch.bool or rows not in (length, length // layout.cp_size):
        return None  # the same on all ranks
    if group is None or layout.cp_size == 1:
        return mask_from_hidden(hidden)
    if rows == length:
        positions = torch.tensor(layout.positions(group.rank(), length), device=hidden.device)
        hidden = hidden.index_select(-2, positions)
    intervals = _intervals_of_rows(hidden)
    parts = [torch.empty_like(intervals) for _ in range(layout.cp_size)]
    dist.all_gather(parts, intervals, group=group)
    return _mask_of(layout.unshard(parts, 0))


def _not_understood(hidden: Tensor, found: str) -> UnsupportedError:
    return UnsupportedError(
        explain(
            got=f"attention_mask of shape {tuple(hidden.shape)}, {str(hidden.dtype).removeprefix('torch.')}: {found}",
            rule="attention follows boolean masks (True: hidden) in which each query sees at most "
            f"{MOST_INTERVALS} intervals of keys, the same in every sequence of the micro-batch, and in a causal layer "
            "no later token",
            remedy="Pass attention_mask=None for causal attention; for padding at the end of sequences that is enough, "
            "with a loss_mask of 0 there",
        )
    )
