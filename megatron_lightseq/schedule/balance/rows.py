"""What a mask asks of every row of work: where its keys are, and how many (query, key) pairs they hold.

A *row* is a short range of queries, about a sixteenth of a rank's. Positions are tokens of the sequence.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from megatron_lightseq.mask import Mask


@dataclass(slots=True)
class Row:
    """A range of queries, and how much of its work is still its owner's.

    ``edges`` and ``sums`` describe the pairs with keys before a position: ``sums[i]`` at ``edges[i]``, linear in
    between. That is exact wherever all of the row's queries see all keys between two edges. Elsewhere it is an
    estimate: it decides how well work is balanced, not what is computed.
    """

    start: int
    stop: int
    edges: tuple[int, ...]
    sums: tuple[int, ...]
    shared: int
    """A range of the keys before this position can be given away. For a causal mask it is where the row begins."""
    document: int
    """Where the first document of the row begins: rows of one document share keys."""
    density: int
    """Queries that see the keys before ``shared``: pairs per key."""
    taken: int = 0
    """Keys before this position are computed by other ranks."""
    given: bool = False
    """The whole row is computed by another rank."""

    def before(self, position: int) -> int:
        """Pairs with keys before ``position``."""
        edges, sums = self.edges, self.sums
        if position >= edges[-1]:
            return sums[-1]
        i = bisect_right(edges, position) - 1
        if i < 0:
            return 0
        return sums[i] + (sums[i + 1] - sums[i]) * (position - edges[i]) // (edges[i + 1] - edges[i])

    def pairs(self, start: int, stop: int) -> int:
        """Pairs with keys in ``[start, stop)``."""
        return self.before(stop) - self.before(start) if stop > start else 0

    @property
    def first_key(self) -> int:
        """The first key that is still the owner's."""
        return max(self.edges[0], self.taken)

    @property
    def last_key(self) -> int:
        """Behind the last key."""
        return self.edges[-1]

    @property
    def left(self) -> int:
        """Pairs that are still the owner's."""
        return 0 if self.given else self.sums[-1] - (self.before(self.taken) if self.taken else 0)


_LONGEST_QUANTUM = 64
"""Tokens of the kernels' blocks."""


def quantum_of(piece_length: int) -> int:
    """Tokens that all cuts are multiples of: the largest divisor of the piece up to 64, and less on short pieces."""
    longest = max(1, min(_LONGEST_QUANTUM, piece_length // _LONGEST_QUANTUM))
    return next(quantum for quantum in range(longest, 0, -1) if piece_length % quantum == 0)


def row_borders(seq_length: int, num_pieces: int, grain: int, quantum: int | None = None) -> list[int]:
    """The borders of all rows: each of ``num_pieces`` equal pieces of the sequence is cut into ``grain`` rows.

    Some rows are empty if a piece has fewer quanta than rows.
    Borders are multiples of ``quantum``; default: :func:`quantum_of` of a piece.
    """
    length = seq_length // num_pieces
    quantum = quantum_of(length) if quantum is None else quantum
    steps = [row * (length // quantum) // grain * quantum for row in range(grain)]
    return [*(piece * length + step for piece in range(num_pieces) for step in steps), seq_length]


def rows_of(mask: Mask, borders: Sequence[int]) -> list[Row]:
    """The rows of ``mask`` between ``borders``, which begin at 0 and end at the sequence length."""
    documents = causal_documents(mask, borders[-1])
    if documents is not None:
        return _rows_of_documents(documents, borders)
    is_causal = mask.is_causal
    return [_row_of_mask(mask, range(*row), borders[-1], is_causal) for row in pairwise(borders)]


def causal_documents(mask: Mask, seq_length: int) -> Sequence[int] | None:
    """The borders of a mask that is causal documents, or one causal document, and nothing else."""
    packing = mask.packing(seq_length)
    return packing[0] if packing is not None and packing[1] == (None, 0) else None


def _rows_of_documents(documents: Sequence[int], borders: Sequence[int]) -> list[Row]:
    """Packed causal documents: one pass over documents and rows."""
    rows = []
    document = 0
    at = borders[0]
    for end in borders[1:]:
        while documents[document + 1] <= at:
            document += 1
        start = documents[document]
        length = min(documents[document + 1], end) - at
        diagonal = length * (length + 1) // 2
        seeing = length
        while documents[document + 1] < end:
            document += 1
            length = min(documents[document + 1], end) - documents[document]
            diagonal += length * (length + 1) // 2
        if start < at:
            before = seeing * (at - start)
            row = Row(at, end, (start, at, end), (0, before, before + diagonal), at, start, seeing)
        else:
            row = Row(at, end, (at, end), (0, diagonal), at, start, seeing)
        rows.append(row)
        at = end
    return rows


def _row_of_mask(mask: Mask, queries: range, seq_length: int, is_causal: bool) -> Row:
    """Any other mask: exact areas at the positions where what the queries see begins, changes or ends."""
    start, stop = queries.start, queries.stop
    corners = sorted({corner for corner in _corners(mask, queries, seq_length) if 0 <= corner <= seq_length})
    sums = [mask.area(queries, range(corner)) for corner in corners]
    total = sums[-1]
    first = max((i for i, pairs in enumerate(sums) if pairs == 0), default=0)
    last = next(i for i, pairs in enumerate(sums) if pairs == total)
    if total == 0:
        return Row(start, stop, (start, stop), (0, 0), start, start, 0)
    edges, sums = corners[first : last + 1], sums[first : last + 1]
    shared = min(start, edges[-1]) if is_causal else edges[-1]
    density = max(1, round((sums[-1] - sums[0]) / max(1, edges[-1] - edges[0])))
    return Row(start, stop, tuple(edges), tuple(sums), shared, edges[0], density)


def _corners(mask: Mask, queries: range, seq_length: int) -> Iterator[int]:
    yield from (0, queries.start, queries.stop, seq_length)
    for term in mask.terms_over(seq_length):
        for edge in (term.start, term.stop):
            pieces = list(edge.tile_pieces(queries))
            for first, end, line in (*pieces[:1], *pieces[-1:]):
                yield from (line.at(queries.start + first), line.at(queries.start + end))
