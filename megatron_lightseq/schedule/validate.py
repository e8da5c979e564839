"""Finds the first reason why a schedule would lose, repeat or misplace work.

The check replays the schedule with sets instead of tensors: which inputs have arrived where, which tiles have been
computed, which results still have to be sent to their owners. It knows nothing about how the schedule was made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.schedule.intervals import Intervals
from megatron_lightseq.schedule.ir import DATAFLOW, RESULTS, Direction, Move, Payload, Step, Tile, chunks_text
from megatron_lightseq.schedule.problem import TileAreas

_Held = dict[tuple[Payload, int], Intervals]
"""Chunks by payload and rank."""
_Result = tuple[Payload, int, int, int]  # payload, the rank that produced it, first chunk, one past the last


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong, and at which step."""

    step: int
    reason: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.reason}"


def _nothing() -> _Held:
    return defaultdict(Intervals)


@dataclass(slots=True)
class _Computed:
    """The tiles that have been computed: those of single chunks in one set, and all by the owners of their chunks."""

    singles: set[Tile] = field(default_factory=set)
    by_ranks: dict[tuple[int, int], list[Tile]] = field(default_factory=lambda: defaultdict(list))
    has_rectangles: bool = False

    def add(self, tile: Tile, ranks: tuple[int, int]) -> bool:
        """Add a tile, unless some pair of its chunks has been computed already; whether it was added."""
        single = tile.queries == tile.keys == 1
        self.has_rectangles |= not single
        if single and tile in self.singles:
            return False
        if self.has_rectangles and any(tile.overlaps(other) for other in self.by_ranks[ranks]):
            return False
        if single:
            self.singles.add(tile)
        self.by_ranks[ranks].append(tile)
        return True


@dataclass(slots=True)
class _Replay:
    """The state of a replay at one step."""

    direction: Direction
    owner: Sequence[int]
    chunks_per_row: int
    areas: TileAreas
    done: _Computed = field(default_factory=_Computed)
    area: int = 0
    """Allowed pairs that have been computed."""
    arrived: _Held = field(default_factory=_nothing)
    together: dict[tuple[Payload, int], list[tuple[int, int]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    """The chunks of each move that has arrived: what is forwarded must have arrived in one move."""
    used: _Held = field(default_factory=_nothing)
    to_send: _Held = field(default_factory=_nothing)
    """Results that were produced in an earlier step and have not been sent yet."""
    sent: _Held = field(default_factory=_nothing)
    """Inputs by the rank that receives them; results by the rank that sends them."""

    def compute(self, rank: int, tile: Tile) -> tuple[str | None, list[_Result]]:
        """The fault of computing ``tile`` in this step, or None; and the results that it produces for other ranks."""
        flow = DATAFLOW[self.direction]
        sides = ((tile.q_chunks, flow.q_input, flow.q_result), (tile.k_chunks, flow.k_input, flow.k_result))
        for chunks, _, _ in sides:
            if not 0 <= chunks.start < chunks.stop <= len(self.owner):
                return f"rank {rank} computes {tile}, which is not in the sequence", []
            if len(set(self.owner[chunks.start : chunks.stop])) > 1:
                return f"rank {rank} computes {tile}, whose chunks belong to several ranks", []
            if self._crosses_rows(chunks.start, chunks.stop):
                return f"rank {rank} computes {tile}, whose chunks belong to several rows of the batch", []
        area = self.areas(tile)
        if not area:
            return f"rank {rank} computes {tile}, which holds no work", []
        if not self.done.add(tile, (self.owner[tile.q], self.owner[tile.k])):
            return f"{tile} is computed twice, the second time by rank {rank}", []
        self.area += area
        made: list[_Result] = []
        for chunks, needed, result in sides:
            if self.owner[chunks.start] == rank:
                continue
            span = (chunks.start, chunks.stop)
            if not self.arrived[needed, rank].covers(*span):
                first, stop = self.arrived[needed, rank].missing(*span)[0]
                text = chunks_text(first, stop - first)
                return f"rank {rank} computes {tile} but {needed}{text} has not arrived", []
            self.used[needed, rank].add(*span)
            if result is not None:
                if self.sent[result, rank].meets(*span):
                    text = chunks_text(chunks.start, len(chunks))
                    return f"rank {rank} adds to {result}{text} after having sent it", []
                made.append((result, rank, *span))
        return None, made

    def _crosses_rows(self, start: int, stop: int) -> bool:
        return start // self.chunks_per_row != (stop - 1) // self.chunks_per_row

    def send(self, move: Move) -> str | None:
        """The fault of sending ``move`` in this step, or None."""
        if move.payload not in _allowed_payloads(self.direction):
            return f"{move} is not a {self.direction} move"
        start, stop = move.chunk, move.chunk + move.chunks
        if not 0 <= start < stop <= len(self.owner):
            return f"{move}: chunk {chunks_text(move.chunk, move.chunks)} is not in the sequence"
        if move.src == move.dst:
            return f"{move}: a rank sends to itself"
        fault = self._misdirected(move, start, stop)
        if fault is not None:
            return f"{move}: {fault}"
        key = (move.payload, move.src if move.payload in RESULTS else move.dst)
        if self.sent[key].meets(start, stop):
            return f"{move} is sent twice"
        self.sent[key].add(start, stop)
        if move.payload in RESULTS:
            if not self.to_send[key].covers(start, stop):
                return f"{move}: rank {move.src} has not finished such a result"
            self.to_send[key].remove(start, stop)
        return None

    def _misdirected(self, move: Move, start: int, stop: int) -> str | None:
        """None if a result goes to its owner, and an input comes from its owner or from a rank that has received
        it."""
        owners, text = set(self.owner[start:stop]), chunks_text(move.chunk, move.chunks)
        if self._crosses_rows(start, stop):
            return f"chunk {text} belongs to several rows of the batch"
        if move.payload in RESULTS:
            return None if owners == {move.dst} else f"rank {move.dst} does not own chunk {text}"
        if owners == {move.src}:
            return None
        if move.dst in owners:
            return f"rank {move.dst} owns chunk {text}"
        together = self.together[move.payload, move.src]
        if not any(first <= start and last >= stop for first, last in together):
            return f"rank {move.src} neither owns chunk {text} nor has received it in one move"
        self.used[move.payload, move.src].add(start, stop)
        return None


def _allowed_payloads(direction: Direction) -> set[Payload | None]:
    flow = DATAFLOW[direction]
    return {flow.q_input, flow.k_input, flow.q_result, flow.k_result}


def find_fault(
    steps: Sequence[Step], *, direction: Direction, layout: SequenceLayout, areas: TileAreas
) -> Fault | None:
    """The first fault of a schedule, or None if it is valid.

    Args:
        steps: tiles and moves of every step.
        direction: which inputs and results travel.
        layout: which rank holds which chunk.
        areas: the areas of tiles.
    """
    replay = _Replay(direction, layout.owner, layout.num_chunks // layout.batch_rows, areas)
    for t, step in enumerate(steps):
        if len(step.tiles) != layout.cp_size:
            return Fault(t, f"tiles of {len(step.tiles)} ranks, the layout has {layout.cp_size}")
        made: list[_Result] = []
        for rank, tiles in enumerate(step.tiles):
            for tile in tiles:
                fault, results = replay.compute(rank, tile)
                if fault is not None:
                    return Fault(t, fault)
                made += results
        for move in step.moves:
            fault = replay.send(move)
            if fault is not None:
                return Fault(t, fault)
        for payload, rank, start, stop in made:
            replay.to_send[payload, rank].add(start, stop)
        for move in step.moves:
            if move.payload not in RESULTS:
                span = (move.chunk, move.chunk + move.chunks)
                replay.arrived[move.payload, move.dst].add(*span)
                replay.together[move.payload, move.dst].append(span)
    return _leftover(replay, layout.num_chunks, last_step=len(steps) - 1)


def _leftover(replay: _Replay, num_chunks: int, last_step: int) -> Fault | None:
    """What is missing or unused at the end of a schedule."""
    if replay.area != replay.areas.total:
        return Fault(last_step, _never_computed(replay, num_chunks))
    for (payload, rank), results in sorted(replay.to_send.items()):
        for start, stop in results:
            text = f"{payload}{chunks_text(start, stop - start)}"
            return Fault(last_step, f"{text} is never sent by rank {rank}")
    for (payload, rank), inputs in sorted(replay.arrived.items()):
        for span in inputs:
            for start, stop in replay.used[payload, rank].missing(*span):
                text = f"{payload}{chunks_text(start, stop - start)}"
                return Fault(last_step, f"{text} is sent to rank {rank}, which never uses it")
    return None


_MOST_CHUNKS_SEARCHED = 256
"""Chunks up to which the tiles that no rank computes are listed."""


def _never_computed(replay: _Replay, num_chunks: int) -> str:
    """The first tiles that no rank computes, or if there are too many chunks to search, the number of missing
    pairs."""
    if num_chunks > _MOST_CHUNKS_SEARCHED:
        return f"{replay.areas.total - replay.area} of {replay.areas.total} pairs are never computed"
    computed = {
        (q, k)
        for tiles in replay.done.by_ranks.values()
        for tile in tiles
        for q in tile.q_chunks
        for k in tile.k_chunks
    }
    chunks = range(num_chunks)
    missing = (
        Tile(q, k) for q in chunks for k in chunks if (q, k) not in computed and replay.areas(Tile(q, k))
    )
    return f"never computed: {' '.join(str(tile) for tile, _ in zip(missing, range(8), strict=False))}"
