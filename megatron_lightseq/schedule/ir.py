"""The vocabulary of schedules: tiles are computed, moves are sent, a step holds both.

A *tile* is one (query chunk, key chunk) block of the attention matrix. A *move* is one transfer; its two ends
are the same record, so a send without its receive cannot be written. Moves of step t run beside the tiles of
step t and have arrived when step t+1 begins.

Standard library only, like everything in this package.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class Direction(StrEnum):
    """Which pass over the tiles a schedule describes."""

    FORWARD = "forward"
    BACKWARD = "backward"


class Payload(StrEnum):
    """What a move carries."""

    Q = "q"
    """Forward input: queries, from their owner to a helper."""
    KV = "kv"
    """Input of both passes: keys and values, from their owner to whoever computes."""
    OUT = "out"
    """Forward result: a helper's partial (out, lse), to the owner of the queries, merged there."""
    QDO = "qdo"
    """Backward input: (q, dout, lse, delta), from the queries' owner to a helper."""
    DQ = "dq"
    """Backward result: gradient of the queries, to their owner, added there."""
    DKV = "dkv"
    """Backward result: gradient of keys and values, to their owner, added there."""


@dataclass(frozen=True, slots=True)
class Dataflow:
    """What a tile needs and leaves behind in one direction, on its query side and on its key side."""

    q_input: Payload
    k_input: Payload
    q_result: Payload
    k_result: Payload | None


DATAFLOW = {
    Direction.FORWARD: Dataflow(Payload.Q, Payload.KV, Payload.OUT, None),
    Direction.BACKWARD: Dataflow(Payload.QDO, Payload.KV, Payload.DQ, Payload.DKV),
}
RESULTS = frozenset({Payload.OUT, Payload.DQ, Payload.DKV})


class Tile(NamedTuple):
    """Chunk ``q`` of the queries against chunk ``k`` of the keys. Text form: ``q3k1``.

    A tuple, because a schedule over P ranks holds about 2 P^2 of them and every check hashes each.
    """

    q: int
    k: int

    def __str__(self) -> str:
        return f"q{self.q}k{self.k}"


class Move(NamedTuple):
    """One transfer of one chunk. Text form: ``kv1:0>2`` (payload, chunk, source rank, destination rank).

    An input is the chunk itself. A result is the sum over all that the source computed for that chunk.
    """

    payload: Payload
    chunk: int
    src: int
    dst: int

    def __str__(self) -> str:
        return f"{self.payload}{self.chunk}:{self.src}>{self.dst}"


@dataclass(frozen=True, slots=True)
class Step:
    """What happens side by side: ``tiles[rank]`` are computed while ``moves`` travel."""

    tiles: tuple[tuple[Tile, ...], ...]
    moves: tuple[Move, ...] = ()


Placement = list[list[list[Tile]]]
"""``placement[step][rank]`` are the tiles that the rank computes at that step. The placement IS the algorithm."""
