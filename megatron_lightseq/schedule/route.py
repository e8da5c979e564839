"""Derives every transfer from a placement: an input travels in the step before its first use, a result in the step
after its last contribution, each once. If all tiles of a chunk are computed in one step, two buffers are enough.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lightseq.schedule.ir import DATAFLOW, RESULTS, Direction, Move, Payload, Placement, Step, Tile


def route(owner: tuple[int, ...], placement: Placement, direction: Direction) -> tuple[Step, ...]:
    """Add the moves to the steps of a placement.

    Args:
        owner: ``owner[chunk]`` is the rank that holds the chunk.
        placement: tiles by step and rank, all of them with work.
        direction: which inputs and results travel.

    Returns:
        The steps. If the first tiles need remote inputs, a step without tiles comes before them; if the last tiles
        produce results for other ranks, one comes after them.
    """
    num_ranks = len(placement[0]) if placement else 0
    spans = _time_spans(owner, placement, direction)
    lead = int(any(first == 0 and move.payload not in RESULTS for move, (first, _) in spans.items()))
    tail = int(
        any(last == len(placement) - 1 and move.payload in RESULTS for move, (_, last) in spans.items())
    )

    nothing: list[list[Tile]] = [[] for _ in range(num_ranks)]
    rows = [nothing] * lead + placement + [nothing] * tail
    moves: list[list[Move]] = [[] for _ in rows]
    for move, (first, last) in spans.items():
        when = last + 1 if move.payload in RESULTS else first - 1
        moves[when + lead].append(move)
    return tuple(
        Step(tuple(tuple(tiles) for tiles in row), tuple(sorted(ms)))
        for row, ms in zip(rows, moves, strict=True)
    )


def _time_spans(
    owner: tuple[int, ...], placement: Placement, direction: Direction
) -> dict[Move, tuple[int, int]]:
    """Every move that the placement needs, with the first and last steps that compute with its chunk."""
    spans: dict[Move, tuple[int, int]] = {}
    for t, row in enumerate(placement):
        for rank, tiles in enumerate(row):
            for move in _moves_of(tiles, rank, owner, direction):
                first, _ = spans.get(move, (t, t))
                spans[move] = (first, t)
    return spans


def _moves_of(tiles: list[Tile], rank: int, owner: tuple[int, ...], direction: Direction) -> Iterator[Move]:
    """The moves that are needed for ``rank`` to compute ``tiles``."""
    flow = DATAFLOW[direction]
    sides: tuple[tuple[set[int], Payload, Payload | None], ...] = (
        ({q for q, _ in tiles}, flow.q_input, flow.q_result),
        ({k for _, k in tiles}, flow.k_input, flow.k_result),
    )
    for chunks, needed, result in sides:
        for chunk in chunks:
            if owner[chunk] == rank:
                continue
            yield Move(needed, chunk, owner[chunk], rank)
            if result is not None:
                yield Move(result, chunk, rank, owner[chunk])
