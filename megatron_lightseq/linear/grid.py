"""Where a sequence is cut, whatever the number of ranks: into pieces that fix the order of all sums.

A state goes from piece to piece of this grid, so outputs and input gradients are the same bits for every number of
ranks whose shards are whole pieces. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable

LONGEST_PIECE = 512
"""Tokens. A state is kept for each piece: fewer tokens take more memory, and more tokens make fewer pieces to share."""
_SHORTEST_PIECE = 32
_RANKS = range(1, 9)
"""Numbers of ranks that pieces are chosen for; larger ones are their multiples in most cases."""


def grid_piece(seq_length: int) -> int:
    """Tokens of a piece, from the length of the whole sequence alone.

    Of the divisors that are neither long nor short, the one whose pieces the most numbers of ranks can share out
    evenly, and the longest of those. :data:`LONGEST_PIECE` for a length without such a divisor: the last piece of a
    shard is then shorter.
    """
    shortest = max(1, min(_SHORTEST_PIECE, seq_length // 256))
    sizes = [size for size in range(shortest, min(LONGEST_PIECE, seq_length) + 1) if seq_length % size == 0]

    def shared(size: int) -> tuple[int, int]:
        return sum(seq_length // size % ranks == 0 for ranks in _RANKS), size

    return max(sizes, key=shared, default=LONGEST_PIECE)


def parts_of(shard_length: int, piece: int, longest: int = 2 * LONGEST_PIECE) -> list[tuple[int, int, int]]:
    """A shard in parts that are computed at once: (start, stop, tokens of a piece).

    All pieces of a part are equally long. What is left behind the last whole piece is a part of its own.

    Args:
        shard_length: tokens of the shard.
        piece: tokens of a piece.
        longest: tokens of a part, unless one piece is longer.
    """
    whole = shard_length // piece * piece
    step = max(1, longest // piece) * piece
    parts = [(start, min(start + step, whole), piece) for start in range(0, whole, step)]
    return parts + ([(whole, shard_length, shard_length - whole)] if whole < shard_length else [])


def pieces_of(parts: Iterable[tuple[int, int, int]]) -> int:
    """How many pieces parts are made of."""
    return sum((stop - start) // piece for start, stop, piece in parts)
