"""Where the keys of every query start or stop: a key position for each query position p.

An edge is cut into pieces. In a piece it is constant (the first token of a document), or it moves along with the
query (causal: the keys stop at p + 1). Edges of windows, packed documents, prefixes and chunks have one or two pieces
per document, regardless of the length of the sequence.

An edge has one canonical form, so that equal edges compare equal regardless of how they were made. Constant pieces of
two or more queries are as long as possible. The queries between them form moving pieces, as long as possible, and
constant pieces of a single query.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from megatron_lightseq.errors import UnsupportedError, explain

FAR = 1 << 62
"""A position beyond every sequence: the stop of a query that sees all keys."""
NOTHING = -2
"""The start and the stop of a query that sees no keys. No edge rises from here to a position in one step, so pieces of
such queries are never joined with others."""


class Line(NamedTuple):
    """A key position as a function of the query position p: ``offset``, or ``p + offset`` where it is moving."""

    offset: int
    moving: bool = False

    def at(self, query: int) -> int:
        """The key position for one query."""
        return self.offset + query if self.moving else self.offset


class Piece(NamedTuple):
    """Queries ``[first, end)``, and the line that the edge follows for them."""

    first: int
    end: int
    line: Line


@dataclass(frozen=True, slots=True)
class Edge:
    """A key position for each query position p >= 0, in columns with one entry per piece. Made by :func:`edge_of`."""

    firsts: tuple[int, ...]
    """First query of each piece, increasing from 0; a piece ends where the next one begins."""
    offsets: tuple[int, ...]
    moving: tuple[bool, ...]
    """Whether the edge is at ``p + offset`` in this piece, or at ``offset``."""
    _hash: int = field(default=0, init=False, repr=False, compare=False)

    def __hash__(self) -> int:
        if not self._hash:
            object.__setattr__(self, "_hash", hash((self.firsts, self.offsets, self.moving)) or 1)
        return self._hash

    def at(self, query: int) -> int:
        """The key position for one query."""
        piece = bisect_right(self.firsts, query) - 1
        return self.offsets[piece] + (query if self.moving[piece] else 0)

    def pieces(self, end: int) -> Iterator[Piece]:
        """The pieces of the queries ``[0, end)``."""
        stops = (*self.firsts[1:], end)
        for first, stop, offset, moving in zip(self.firsts, stops, self.offsets, self.moving, strict=True):
            if first < end:
                yield Piece(first, min(stop, end), Line(offset, moving))

    def numbers(self, queries: range) -> range:
        """The indices of the pieces that contain the positions of ``queries``."""
        if not queries:
            return range(0)
        return range(bisect_right(self.firsts, queries[0]) - 1, bisect_left(self.firsts, queries[-1] + 1))

    def tile_pieces(self, queries: range) -> Iterator[Piece]:
        """The pieces of a tile: ``first`` and ``end`` are indices into ``queries``, lines are those of positions."""
        numbers, at = self.numbers(queries), 0
        for piece in numbers:
            end = len(queries)
            if piece + 1 < numbers.stop:
                end = -((queries.start - self.firsts[piece + 1]) // queries.step)
            if end > at:
                yield Piece(at, end, Line(self.offsets[piece], self.moving[piece]))
                at = end

    def bounds(self, queries: range) -> tuple[int, int]:
        """Bounds of the edge over all ``queries`` that see something; quick to compute, but may be too wide."""
        if not _rises(self):
            return 0, FAR
        first, last = self.at(queries[0]), self.at(queries[-1])
        if first == NOTHING:
            piece = bisect_right(self.firsts, queries[0])
            first = self.at(self.firsts[piece]) if piece < len(self.firsts) else FAR
        if last == NOTHING:
            piece = bisect_right(self.firsts, queries[-1]) - 1
            last = self.at(self.firsts[piece] - 1) if piece else 0
        return first, last

    def count(self, queries: range, keys: range) -> int:
        """How many (query, key) pairs of a tile have the key before the edge; in closed form for each piece.

        Raises:
            UnsupportedError: the positions of queries and keys have different strides.
        """
        stride, num_keys, total = common_stride(queries, keys), len(keys), 0
        for first, end, line in self.tile_pieces(queries):
            if line.moving:  # the i-th query has i + ahead keys before the edge, clipped to [0, num_keys]
                ahead = -((keys.start - queries.start - line.offset) // stride)
                total += _clipped_sum(end + ahead, num_keys) - _clipped_sum(first + ahead, num_keys)
            else:
                before = -((keys.start - line.offset) // stride)
                total += (end - first) * min(max(before, 0), num_keys)
        return total


class _Columns:
    """The pieces of an edge while they are appended from left to right."""

    def __init__(self) -> None:
        self.firsts: list[int] = []
        self.offsets: list[int] = []
        self.moving: list[bool] = []

    def append(self, first: int, end: int, offset: int, moving: bool) -> None:
        """Add the queries ``[first, end)``, which follow the ones added last."""
        if self.firsts:
            last = self.offsets[-1] + (first - 1 if self.moving[-1] else 0)
            step = offset + (first if moving else 0) - last
            if step == 0:
                self._level(first, last)
                first = first + 1 if moving else end
            elif step == 1 and (moving or end - first == 1) and self._may_rise(first):
                first = end
        if first < end:
            lone = moving and end - first == 1
            self._push(first, offset + first if lone else offset, moving and not lone)

    def _push(self, first: int, offset: int, moving: bool) -> None:
        self.firsts.append(first)
        self.offsets.append(offset)
        self.moving.append(moving)

    def _level(self, first: int, last: int) -> None:
        """Make the last piece a constant one that includes the query ``first``, because its value is ``last`` too."""
        if self.moving[-1]:
            if self.firsts[-1] == first - 2:  # one query is left of the moving piece
                self.offsets[-1] += self.firsts[-1]
                self.moving[-1] = False
            self._push(first - 1, last, False)

    def _may_rise(self, first: int) -> bool:
        """Whether the last piece is moving, or can become moving because it has a single query."""
        if not self.moving[-1] and self.firsts[-1] == first - 1:
            self.offsets[-1] -= self.firsts[-1]
            self.moving[-1] = True
        return self.moving[-1]


@lru_cache(maxsize=64)
def _rises(edge: Edge) -> bool:
    """Whether the edge never falls from one query that sees something to the next such query."""
    ends = (*edge.firsts[1:], FAR)
    before = 0
    for first, end, offset, moving in zip(edge.firsts, ends, edge.offsets, edge.moving, strict=True):
        if moving or offset != NOTHING:
            if offset + (first if moving else 0) < before:
                return False
            before = offset + (end - 1 if moving else 0)
    return True


def edge_of(pieces: Iterable[tuple[int, int, bool]]) -> Edge:
    """The edge of pieces in order, in canonical form.

    Args:
        pieces: each as ``(end, offset, moving)``. The first one begins at query 0, each other one where the one
            before ends; pieces without queries are dropped.
    """
    columns, first = _Columns(), 0
    for end, offset, moving in pieces:
        if first < end:
            columns.append(first, end, offset, moving)
            first = end
    return Edge(tuple(columns.firsts), tuple(columns.offsets), tuple(columns.moving))


def common_stride(queries: range, keys: range) -> int:
    """The stride of a tile's positions.

    Raises:
        UnsupportedError: queries and keys have different strides.
    """
    if len(queries) > 1 and len(keys) > 1 and queries.step != keys.step:
        raise UnsupportedError(
            explain(
                got=f"queries of stride {queries.step} against keys of stride {keys.step}",
                rule="the positions of a tile's queries and keys have one stride",
                remedy="Cut both by the same layout",
            )
        )
    return queries.step if len(queries) > 1 else keys.step


def _clipped_sum(end: int, limit: int) -> int:
    """The sum of all x in ``[0, end)``, each clipped to ``limit``."""
    rising = min(max(end, 0), limit)
    return rising * (rising - 1) // 2 + max(end - limit, 0) * limit
