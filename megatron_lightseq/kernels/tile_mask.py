"""A mask as passed to kernels: a band in the index space of the tile and, if that is not enough, a range per query."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from megatron_lightseq.mask import Edge, Line, Mask, Term
from megatron_lightseq.mask.edge import FAR, NOTHING, common_stride


@dataclass(frozen=True, slots=True)
class TileMask:
    """Which keys of a tile each query row may see.

    Row i sees key j iff ``i + band_lo <= j <= i + band_hi`` and, where ``key_ranges`` is given,
    ``key_ranges[0, i] <= j < key_ranges[1, i]``.
    """

    band_lo: int
    band_hi: int
    key_ranges: Tensor | None = None
    """int32, (2, Sq)."""

    @staticmethod
    def of(mask: Mask, queries: range, keys: range, device: torch.device) -> tuple[TileMask, ...]:
        """The tile of ``mask`` at these global positions: one for each kernel call that it takes.

        No pair is in two of them. There is at least one, so that a call that overwrites its results can be made
        even where nothing is visible.

        Args:
            queries: positions of the tile's queries, at least one.
            keys: positions of the tile's keys, at least one, with the same stride.
            device: where ``key_ranges`` are wanted.

        Raises:
            UnsupportedError: the strides differ.
        """
        tile = _Tile(queries, keys, common_stride(queries, keys))
        terms = mask.terms_over(max(queries[-1], keys[-1]) + 1)
        if len(terms) != 1:
            terms = tuple(term for term in terms if term.area(queries, keys))
        return tuple(tile.mask_of(term, device) for term in terms) or (TileMask(len(keys), len(keys)),)


@dataclass(frozen=True, slots=True)
class _Tile:
    """Positions of a tile. Its keys are counted from 0 here, and edges are cut to the tile."""

    queries: range
    keys: range
    stride: int

    def mask_of(self, term: Term, device: torch.device) -> TileMask:
        """What ``term`` allows in the tile.

        An edge that is not a band is given row by row, together with a band around it, with which kernels find faster
        what they can skip.
        """
        num_queries, num_keys = len(self.queries), len(self.keys)
        first, end = self._band(term.start), self._band(term.stop)
        if first is not None and end is not None:
            return TileMask(first, end - 1)
        ranges = torch.empty(2, num_queries, dtype=torch.int32)
        if first is None:
            ranges[0], nearest, _ = self._by_row(term.start, nothing=FAR)
        else:
            ranges[0], nearest = 0, first
        if end is None:
            ranges[1], _, farthest = self._by_row(term.stop, nothing=NOTHING)
        else:
            ranges[1], farthest = num_keys, end
        lo, hi = (min(max(bound, -num_queries), num_keys) for bound in (nearest, farthest - 1))
        return TileMask(lo, hi, ranges.to(device))

    def _band(self, edge: Edge) -> int | None:
        """The b for which the edge of every row i is ``i + b``, clipped to the tile; None if there is none."""
        num_queries, num_keys = len(self.queries), len(self.keys)
        least, most = -num_queries, num_keys
        for first, end, line in edge.tile_pieces(self.queries):
            at = self._index(line)
            lowest, highest = (first + at, end - 1 + at) if line.moving else (at, at)
            if highest <= 0:  # before all keys
                most = min(most, 1 - end)
            elif lowest >= num_keys:  # after all keys
                least = max(least, num_keys - first)
            elif line.moving:
                least, most = max(least, lowest - first), min(most, lowest - first)
            else:
                return None
            if least > most:
                return None
        return num_keys if most == num_keys else least

    def _index(self, line: Line) -> int:
        """Index of the key at which a line is in row 0. A moving line advances by one key per row."""
        ahead = self.keys.start - (self.queries.start if line.moving else 0)
        return -((ahead - line.offset) // self.stride)

    def _by_row(self, edge: Edge, nothing: int) -> tuple[Tensor, int, int]:
        """The edge of every row, clipped to the tile, and its minimum and maximum distance from its row.

        Args:
            edge: of a term.
            nothing: the position to take for rows that see nothing.

        Returns:
            (Sq,), int32, and two numbers that hold for any row and are reached where rows see something.
        """
        num_queries, num_keys = len(self.queries), len(self.keys)
        numbers = edge.numbers(self.queries)
        firsts, offsets, moving = (column[numbers.start : numbers.stop] for column in _columns(edge))
        firsts = torch.cat([firsts, torch.tensor([self.queries.stop])]) - self.queries.start
        rows = _divided_up(firsts, self.queries.step).clamp_(0, num_queries)
        lengths, at = torch.diff(rows), offsets - self.keys.start
        if nothing != NOTHING and NOTHING in edge.offsets[numbers.start : numbers.stop]:
            at = torch.where((offsets == NOTHING) & ~moving, nothing, at)
        if not any(edge.moving[numbers.start : numbers.stop]):
            at = _divided_up(at, self.stride).clamp_(0, num_keys)
            by_row = at.int().repeat_interleave(lengths, output_size=num_queries)
            return by_row, int((at - rows[1:]).min()) + 1, int((at - rows[:-1]).max())
        at = _divided_up(at + moving * self.queries.start, self.stride)
        at = torch.where(moving, at.clamp(-num_queries, num_keys), at.clamp(0, num_keys))
        by_row = at.int().repeat_interleave(lengths, output_size=num_queries)
        moves = moving.int().repeat_interleave(lengths, output_size=num_queries)
        by_row.addcmul_(moves, torch.arange(num_queries, dtype=torch.int32)).clamp_(0, num_keys)
        nearest, farthest = (torch.where(moving, at, at - row) for row in (rows[1:] - 1, rows[:-1]))
        return by_row, int(nearest.min()), int(farthest.max())


def _divided_up(numbers: Tensor, divisor: int) -> Tensor:
    return numbers if divisor == 1 else -torch.div(-numbers, divisor, rounding_mode="floor")


@lru_cache(maxsize=32)
def _columns(edge: Edge) -> tuple[Tensor, Tensor, Tensor]:
    """The columns of an edge as tensors; kept for the tiles of a few masks."""
    columns = edge.firsts, edge.offsets, edge.moving
    firsts, offsets, moving = (torch.frombuffer(array("q", column), dtype=torch.int64) for column in columns)
    return firsts, offsets, moving.bool()
