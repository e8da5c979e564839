"""The vocabulary of schedules: tiles are computed, moves are sent, and a step holds both.

A *tile* is one (query chunk, key chunk) block of the attention matrix. A *move* is one transfer; both of its ends are
in one record, so a send without its receive cannot be written. The moves of step t run concurrently with the tiles of
step t and have arrived when step t + 1 begins.

Standard library only, like everything in this package.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class Direction(StrEnum):
    """The forward or the backward pass of attention."""

    FORWARD = "forward"
    BACKWARD = "backward"


class Payload(StrEnum):
    """What a move carries."""

    Q = "q"
    """Forward input: queries, sent by their owner to the rank that computes."""
    KV = "kv"
    """Input of both passes: keys and values, sent by their owner to the rank that computes."""
    OUT = "out"
    """Forward result: a partial (out, lse), sent to the owner of the queries and merged there."""
    QDO = "qdo"
    """Backward input: (q, dout, lse, delta), sent by the queries' owner to the rank that computes."""
    DQ = "dq"
    """Backward result: gradient of the queries, sent to their owner and added there."""
    DKV = "dkv"
    """Backward result: gradient of keys and values, sent to their owner and added there."""
    MAP = "m"
    """Of linear attention: what a run of chunks does to any state that enters it (:mod:`schedule.scan`)."""
    STATE = "s"
    """Of linear attention: the state behind a run of chunks in which a document begins."""


@dataclass(frozen=True, slots=True)
class Dataflow:
    """What a tile reads and what it produces in one direction, on its query side and on its key side."""

    q_input: Payload
    k_input: Payload
    q_result: Payload
    k_result: Payload | None


DATAFLOW = {
    Direction.FORWARD: Dataflow(Payload.Q, Payload.KV, Payload.OUT, None),
    Direction.BACKWARD: Dataflow(Payload.QDO, Payload.KV, Payload.DQ, Payload.DKV),
}
RESULTS = frozenset({Payload.OUT, Payload.DQ, Payload.DKV})
OF_STATES = frozenset({Payload.MAP, Payload.STATE})
"""Payloads of scans; the others are made of tokens."""
OF_TOKENS = tuple(payload for payload in Payload if payload not in OF_STATES)


class Tile(NamedTuple):
    """Chunk ``q`` of the queries against chunk ``k`` of the keys, or a rectangle of chunks that starts there.

    Text form: ``q3k1``, or for a rectangle its first and last chunks: ``q3-6k0-15``. All queries of a tile belong
    to one piece of the layout, and so do all keys. A tuple, because a schedule over P ranks holds about 2 P^2 tiles
    and every check hashes each of them.
    """

    q: int
    k: int
    queries: int = 1
    """Number of query chunks."""
    keys: int = 1
    """Number of key chunks."""

    @property
    def q_chunks(self) -> range:
        """The query chunks."""
        return range(self.q, self.q + self.queries)

    @property
    def k_chunks(self) -> range:
        """The key chunks."""
        return range(self.k, self.k + self.keys)

    def overlaps(self, other: Tile) -> bool:
        """Whether both tiles contain the same pair of a query chunk and a key chunk."""
        return (
            self.q < other.q + other.queries
            and other.q < self.q + self.queries
            and self.k < other.k + other.keys
            and other.k < self.k + self.keys
        )

    def __str__(self) -> str:
        return f"q{chunks_text(self.q, self.queries)}k{chunks_text(self.k, self.keys)}"


class Move(NamedTuple):
    """One transfer of one chunk, or of several adjacent ones.

    Text form: ``kv1:0>2`` (payload, chunk, source rank, destination rank), or with the first and last of several
    chunks ``kv1-3:0>2``. An input is the chunks themselves. A result combines everything that the source computed
    for them.
    """

    payload: Payload
    chunk: int
    src: int
    dst: int
    chunks: int = 1
    """Number of adjacent chunks of one piece."""

    def __str__(self) -> str:
        return f"{self.payload}{chunks_text(self.chunk, self.chunks)}:{self.src}>{self.dst}"


def chunks_text(first: int, count: int) -> str:
    """``3`` for one chunk, ``3-6`` for several."""
    return str(first) if count == 1 else f"{first}-{first + count - 1}"


@dataclass(frozen=True, slots=True)
class Step:
    """What happens concurrently: ``tiles[rank]`` are computed while ``moves`` travel."""

    tiles: tuple[tuple[Tile, ...], ...]
    moves: tuple[Move, ...] = ()


Placement = list[list[list[Tile]]]
"""``placement[step][rank]`` are the tiles that the rank computes at that step. The placement IS the algorithm."""


class Item(NamedTuple):
    """What a rank knows of a run of chunks, in linear attention: its MAP, or the STATE behind it.

    Text form: ``m2``, or with the first and last of several chunks ``s0-3``.
    """

    payload: Payload
    chunk: int
    chunks: int = 1
    """Number of adjacent chunks."""

    @property
    def stop(self) -> int:
        """One past the last chunk."""
        return self.chunk + self.chunks

    def __str__(self) -> str:
        return f"{self.payload}{chunks_text(self.chunk, self.chunks)}"


class Fold(NamedTuple):
    """A rank joins what it knows of two adjacent runs. Text form: ``s0-1*m2``.

    ``earlier`` is the one that a state reaches first, which in the backward direction is the one behind. The result is
    of the kind of ``earlier``, over both runs.
    """

    earlier: Item
    later: Item

    @property
    def result(self) -> Item:
        """What the rank knows afterwards."""
        first = min(self.earlier.chunk, self.later.chunk)
        return Item(self.earlier.payload, first, self.earlier.chunks + self.later.chunks)

    def __str__(self) -> str:
        return f"{self.earlier}*{self.later}"


@dataclass(frozen=True, slots=True)
class ScanStep:
    """``folds[rank]`` are computed, in order, while ``moves`` travel; what arrives can be used in the next step."""

    folds: tuple[tuple[Fold, ...], ...]
    moves: tuple[Move, ...] = ()


def item_of(move: Move) -> Item:
    """What a move of a scan carries."""
    return Item(move.payload, move.chunk, move.chunks)
