"""A custom method: keys and values stay where they are, and queries travel.

At distance t, rank r computes the tiles of rank r + t's queries against its own keys and sends the partial results
back. This suits models with few query heads per key/value head, and memory that has no room for other ranks' keys.
Transfers, merging, the backward pass and the checks all follow from the placement.
"""

from __future__ import annotations

from megatron_lightseq.schedule import Method, Placement, Problem, Tile


def place_travelling_queries(problem: Problem) -> Placement:
    layout, size = problem.layout, problem.layout.cp_size

    def tiles(rank: int, distance: int) -> list[Tile]:
        visitor = (rank + distance) % size
        return [Tile(q, k) for q in layout.chunks_of(visitor) for k in layout.chunks_of(rank)]

    return [[tiles(rank, distance) for rank in range(size)] for distance in range(size)]


travelling_queries = Method("travelling_queries", place_travelling_queries)
