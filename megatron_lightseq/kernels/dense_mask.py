"""Converts dense masks, as Megatron-Core and Hugging Face pass them to attention, to equal :class:`Mask` objects.

Shape letters: S = tokens of the sequence, R = rows (queries) given, T = intervals per row.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor

from megatron_lightseq.errors import ConfigError, explain
from megatron_lightseq.mask import Mask, Term
from megatron_lightseq.mask.edge import NOTHING, edge_of

MOST_INTERVALS = 4
"""Intervals per row up to which a mask is worth expressing: each one is a kernel call."""


def mask_from_dense(allowed: Tensor, most_intervals: int = MOST_INTERVALS) -> Mask | None:
    """The mask that allows exactly what a dense one allows.

    Causal masks, full masks and windows are returned for any length, all others for the given length. This reads the
    whole tensor, and synchronises a GPU: call it once per batch.

    Args:
        allowed: (S, S) or (B, 1, S, S), bool; True where the query (first S) may attend to the key (second S).
        most_intervals: how many separate intervals of keys a query may see.

    Returns:
        None if sequences of the batch differ, or if a query sees more than ``most_intervals``.

    Raises:
        ConfigError: the tensor has another shape or dtype.
    """
    shape = tuple(allowed.shape)
    is_batch = allowed.dim() == 4 and shape[0] > 0 and shape[1] == 1
    if allowed.dtype != torch.bool or not (allowed.dim() == 2 or is_batch) or shape[-1] != shape[-2]:
        raise ConfigError(
            explain(
                got=f"a dense mask {shape} of {allowed.dtype}",
                rule="a dense mask is (S, S) or (B, 1, S, S) of torch.bool, True where a query may attend to a key",
                remedy="Invert Megatron's masks, which are True where a key is hidden",
            )
        )
    rows = allowed[0, 0] if is_batch else allowed
    if is_batch and not bool((allowed == rows).all()):
        return None
    intervals = visible_intervals(rows, most_intervals)
    return None if intervals is None else mask_from_intervals(intervals)


def visible_intervals(allowed: Tensor, most_intervals: int = MOST_INTERVALS) -> Tensor | None:
    """The intervals of keys that each row of a dense mask sees.

    Args:
        allowed: (R, S), bool; True where a query may attend to a key.
        most_intervals: T.

    Returns:
        (R, T, 2), int64, on the device of ``allowed``: first key and end of each interval, from left to right; equal
        where a row has fewer. None if a row has more.
    """
    changes = torch.nn.functional.pad(allowed.to(torch.int8), (1, 1)).diff(dim=1)
    number = (changes > 0).sum(1)
    if number.numel() and int(number.max()) > most_intervals:
        return None
    # The k-th rise and the k-th fall of a row bound its k-th interval.
    place = torch.arange(int(number.sum()), device=allowed.device)
    place -= (number.cumsum(0) - number).repeat_interleave(number)
    intervals = torch.zeros(len(allowed), most_intervals, 2, dtype=torch.int64, device=allowed.device)
    for side, sign in enumerate((1, -1)):
        row, key = (changes == sign).nonzero(as_tuple=True)
        intervals[row, place, side] = key
    return intervals


def mask_from_intervals(intervals: Tensor) -> Mask:
    """The mask in which the query at position p sees the keys of ``intervals[p]``.

    Causal masks, full masks and windows are returned for any length, all others for the given length.

    Args:
        intervals: (S, 2) or (S, T, 2), integers: first key and end of each interval; no key where they are equal.
    """
    length = len(intervals)
    bounds = intervals.reshape(length, -1, 2).cpu()
    bounds = bounds.masked_fill((bounds[..., :1] >= bounds[..., 1:]), NOTHING)
    parts = [
        Mask((Term(*(edge_of(_pieces(edge)) for edge in part.unbind(1))),), length)
        for part in bounds.unbind(1)
        if length and bool((part != NOTHING).any())
    ]
    mask = reduce(Mask.__or__, parts, Mask((), length))
    packing = mask.packing(length)
    return mask if packing is None or packing[0] != (0, length) else Mask.window(*packing[1])


def _pieces(edge: Tensor) -> Iterator[tuple[int, int, bool]]:
    """Pieces ``(end, offset, moving)`` of an edge (S,) that is given for every query."""
    steps = edge.diff()
    breaks = (steps != 0) & (steps != 1)
    breaks[1:] |= steps[1:] != steps[:-1]
    firsts = [0, *(breaks.nonzero().squeeze(1) + 1).tolist()]
    ends, values = [*firsts[1:], len(edge)], edge[firsts].tolist()
    rises = [*(steps == 1).tolist(), False]
    for first, end, value in zip(firsts, ends, values, strict=True):
        moving = end - first > 1 and rises[first]
        yield end, value - first if moving else value, moving
