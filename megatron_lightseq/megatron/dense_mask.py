"""Attention masks that are given as dense tensors: which :class:`~megatron_lightseq.mask.Mask` hides the same keys.

Megatron's dense masks are boolean, (B or 1, 1, S, S), and True where a key is hidden. Attention here computes masks in
which each query sees one interval of positions. A dense mask of that kind is recognised by its rows; any other is
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
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask

_ROWS_AT_A_TIME = 1024
"""Bounds temporary tensors to as many rows of a mask."""
_NO_INTERVAL = -1
_REMEMBERED = 8
"""Masks whose meaning is remembered: those of the micro-batches that a pipeline has in flight."""


def mask_from_dense(hidden: Tensor) -> Mask | None:
    """The mask that hides the same keys as a dense one.

    Args:
        hidden: (..., S, S), bool, True where a key is hidden; all leading entries must be equal.

    Returns:
        A causal or full mask, a window, or documents (causal or not), whichever is exact; None if none is.
    """
    return mask_from_intervals(visible_intervals(hidden))


def visible_intervals(hidden: Tensor) -> Tensor:
    """The keys that each row sees, as an interval.

    Args:
        hidden: (..., R, S), bool.

    Returns:
        (R, 2) int64: first visible key and the one after the last. A row is (-1, -1) where its visible keys are no
        interval, or differ between leading entries.
    """
    rows, length = hidden.shape[-2:]
    whole = hidden.reshape(-1, rows, length)
    blocks = [
        _intervals(whole[:, begin : begin + _ROWS_AT_A_TIME]) for begin in range(0, rows, _ROWS_AT_A_TIME)
    ]
    return torch.cat(blocks)


def _intervals(hidden: Tensor) -> Tensor:
    visible = ~hidden[0]
    first = visible.to(torch.uint8).argmax(-1)
    stop = visible.shape[-1] - visible.flip(-1).to(torch.uint8).argmax(-1)
    interval = (visible.sum(-1) == stop - first) & (hidden == hidden[:1]).flatten(2).all(-1).all(0)
    return torch.where(interval[:, None], torch.stack([first, stop], -1), _NO_INTERVAL)


def mask_from_intervals(intervals: Tensor) -> Mask | None:
    """The mask in which the query at position p sees the keys of ``intervals[p]``; None if there is none.

    Args:
        intervals: (S, 2) int64, as :func:`visible_intervals` returns them for all rows.
    """
    intervals = intervals.cpu()
    for candidate in _candidates(intervals):
        if torch.equal(_intervals_of(candidate, len(intervals)), intervals):
            return candidate
    return None


def _candidates(intervals: Tensor) -> list[Mask]:
    """The only masks of each kind that can be meant: read off the first and the last row, and the borders."""
    length = len(intervals)
    first, stop = intervals.unbind(-1)
    left, right = length - 1 - int(first[-1]), int(stop[0]) - 1
    candidates = [Mask.causal(), Mask.full()]
    if left >= 0 and right >= 0:
        sides = (None if side == length - 1 else side for side in (left, right))
        candidates.append(Mask.window(*sides))
    starts = (first == torch.arange(length)).nonzero().flatten().tolist()
    borders = [*starts, length] if starts[:1] == [0] else [0, length]
    candidates.append(Mask.documents(borders))
    beginnings = [0, *(1 + (first[1:] != first[:-1]).nonzero().flatten()).tolist(), length]
    return [*candidates, Mask.documents(beginnings, causal=False)]


def _intervals_of(mask: Mask, length: int) -> Tensor:
    """(S, 2): what the rows of a mask see."""
    positions = torch.arange(length)
    borders = torch.tensor(mask.cu_seqlens or (0, length))
    document = torch.bucketize(positions, borders, right=True)
    first, stop = borders[document - 1], borders[document]
    if mask.left is not None:
        first = torch.maximum(first, positions - mask.left)
    if mask.right is not None:
        stop = torch.minimum(stop, positions + mask.right + 1)
    return torch.stack([first, stop], -1)


@dataclass(frozen=True, slots=True)
class _Seen:
    """A mask that was read before: the memory it lies in, the view of it, and what it says."""

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
        """The mask that a dense one stands for.

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
        return None  # alike on all ranks
    if group is None or layout.cp_size == 1:
        return mask_from_dense(hidden)
    if rows == length:
        positions = torch.tensor(layout.positions(group.rank(), length), device=hidden.device)
        hidden = hidden.index_select(-2, positions)
    intervals = visible_intervals(hidden)
    parts = [torch.empty_like(intervals) for _ in range(layout.cp_size)]
    dist.all_gather(parts, intervals, group=group)
    return mask_from_intervals(layout.unshard(parts, 0))


def _not_understood(hidden: Tensor, found: str) -> UnsupportedError:
    return UnsupportedError(
        explain(
            got=f"attention_mask of shape {tuple(hidden.shape)}, {str(hidden.dtype).removeprefix('torch.')}: {found}",
            rule="attention follows boolean masks (True: hidden) that hide later tokens (causal), tokens outside of a "
            "sliding window, or tokens of other documents, in the same way in every sequence of the micro-batch",
            remedy="Pass attention_mask=None for causal attention; for padding at the end of sequences that is enough, "
            "with a loss_mask of 0 there",
        )
    )
