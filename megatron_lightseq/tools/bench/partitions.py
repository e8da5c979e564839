"""How other systems share packed causal documents among ranks: for comparison, counted and not run.

Both move tokens, not work: each rank computes its own queries against all their keys.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

DISPATCH_CHUNK = 2048
"""Tokens of the query chunks that MagiAttention dispatches."""


@dataclass(frozen=True, slots=True)
class Partition:
    """What each rank computes and receives in one pass, in any order."""

    pairs: tuple[int, ...]
    """Allowed (query, key) pairs by rank."""
    keys: tuple[int, ...]
    """Key tokens that each rank receives."""


def zigzag_per_document(borders: Sequence[int], cp_size: int) -> Partition:
    """Every document in 2P pieces, of which rank r computes pieces r and 2P - 1 - r; keys pass around a ring.

    Transformer Engine's context parallelism for packed sequences, and WLB-LLM per document. Documents are not padded
    here to multiples of 2P, as they are there.
    """
    pairs = [0] * cp_size
    pieces = 2 * cp_size
    for start, stop in pairwise(borders):
        length = stop - start
        for piece in range(pieces):
            first, last = length * piece // pieces, length * (piece + 1) // pieces
            rank = min(piece, pieces - 1 - piece)
            pairs[rank] += (first + 1 + last) * (last - first) // 2
    num_tokens = borders[-1]
    return Partition(tuple(pairs), (num_tokens - num_tokens // cp_size,) * cp_size)


def heaviest_first(borders: Sequence[int], cp_size: int, chunk: int = DISPATCH_CHUNK) -> Partition:
    """Query chunks in order of their work, each to the rank with the least so far; all ranks get equally many.

    MagiAttention's default dispatch. A rank receives exactly the keys that its queries see.
    """
    num_tokens = borders[-1]
    chunk = min(chunk, num_tokens // cp_size)
    per_rank = num_tokens // chunk // cp_size
    work = [_chunk_work(borders, at, min(at + chunk, num_tokens)) for at in range(0, num_tokens, chunk)]
    heap = [(0, rank) for rank in range(cp_size)]
    taken: list[list[int]] = [[] for _ in range(cp_size)]
    pairs = [0] * cp_size
    for index in sorted(range(len(work)), key=lambda i: -work[i][0]):
        load, rank = heapq.heappop(heap)
        taken[rank].append(index)
        pairs[rank] = load + work[index][0]
        if len(taken[rank]) < per_rank or not heap:
            heapq.heappush(heap, (pairs[rank], rank))
    keys = tuple(_tokens_of_others(indices, work, chunk, num_tokens) for indices in taken)
    return Partition(tuple(pairs), keys)


def _chunk_work(borders: Sequence[int], start: int, stop: int) -> tuple[int, int]:
    """Pairs of the queries in ``[start, stop)``, and the first key that they see."""
    pairs, first_key = 0, start
    for document, end in pairwise(borders):
        a, b = max(document, start), min(end, stop)
        if a < b:
            pairs += (a - document + 1 + b - document) * (b - a) // 2
            first_key = min(first_key, document)
    return pairs, first_key


def _tokens_of_others(
    indices: Sequence[int], work: Sequence[tuple[int, int]], chunk: int, num_tokens: int
) -> int:
    """Key tokens that the chunks see and the rank does not hold."""
    total = reached = 0
    for index in sorted(indices):
        start, stop = max(work[index][1], reached), min((index + 1) * chunk, num_tokens)
        total += max(0, stop - start)
        reached = max(reached, stop)
    own = sum(min((index + 1) * chunk, num_tokens) - index * chunk for index in indices)
    return total - own


PARTITIONS: dict[str, Callable[[Sequence[int], int], Partition]] = {
    "zigzag per document (TE)": zigzag_per_document,
    "heaviest first (MagiAttention)": heaviest_first,
}
"""Every partition by the name that the benchmark shows."""
