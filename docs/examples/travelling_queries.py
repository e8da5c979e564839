"""A method of one's own: keys and values stay where they are, and the queries travel.

Good when there are few query heads per key/value head and many ranks must not hold others' keys: rank r computes,
at distance t, the tiles of rank r + t's queries against its own keys, and the partial results go home. Nothing else is
written down: transfers, merging, the backward pass and the checks follow from the placement.
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
