"""Finds the first reason why a schedule would lose, repeat or misplace work.

The check replays the schedule with sets instead of tensors: which inputs have arrived where, which tiles have been
computed, which results still have to be sent to their owners. It knows nothing about how the schedule was made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_lightseq.schedule.ir import DATAFLOW, RESULTS, Direction, Move, Payload, Step, Tile

_Item = tuple[Payload, int, int]  # (payload, chunk, the rank that received or produced it)


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong, and at which step."""

    step: int
    reason: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.reason}"


@dataclass(slots=True)
class _Replay:
    """The state of a replay at one step."""

    direction: Direction
    owner: Sequence[int]
    work: Mapping[Tile, int]
    done: set[Tile] = field(default_factory=set)
    arrived: set[_Item] = field(default_factory=set)
    used: set[_Item] = field(default_factory=set)
    to_send: set[_Item] = field(default_factory=set)
    """Results that were produced in an earlier step and have not been sent yet."""
    sent: set[_Item] = field(default_factory=set)

    def compute(self, rank: int, tile: Tile) -> tuple[str | None, set[_Item]]:
        """The fault of computing ``tile`` in this step, or None; and the results that it produces for other ranks."""
        flow = DATAFLOW[self.direction]
        if tile not in self.work:
            return f"rank {rank} computes {tile}, which holds no work", set()
        if tile in self.done:
            return f"{tile} is computed twice, the second time by rank {rank}", set()
        self.done.add(tile)
        made = set()
        sides = ((tile.q, flow.q_input, flow.q_result), (tile.k, flow.k_input, flow.k_result))
        for chunk, needed, result in sides:
            if self.owner[chunk] == rank:
                continue
            if (needed, chunk, rank) not in self.arrived:
                return f"rank {rank} computes {tile} but {needed}{chunk} has not arrived", set()
            self.used.add((needed, chunk, rank))
            if result is not None:
                if (result, chunk, rank) in self.sent:
                    return f"rank {rank} adds to {result}{chunk} after having sent it", set()
                made.add((result, chunk, rank))
        return None, made

    def send(self, move: Move) -> str | None:
        """The fault of sending ``move`` in this step, or None."""
        if move.payload not in _allowed_payloads(self.direction):
            return f"{move} is not a {self.direction} move"
        item = (move.payload, move.chunk, move.src if move.payload in RESULTS else move.dst)
        home = move.dst if move.payload in RESULTS else move.src
        if not 0 <= move.chunk < len(self.owner) or self.owner[move.chunk] != home:
            return f"{move}: rank {home} does not own chunk {move.chunk}"
        if move.src == move.dst:
            return f"{move}: a rank sends to itself"
        if item in self.sent:
            return f"{move} is sent twice"
        self.sent.add(item)
        if move.payload in RESULTS:
            if item not in self.to_send:
                return f"{move}: rank {move.src} has not finished such a result"
            self.to_send.remove(item)
        return None


def _allowed_payloads(direction: Direction) -> set[Payload | None]:
    flow = DATAFLOW[direction]
    return {flow.q_input, flow.k_input, flow.q_result, flow.k_result}


def find_fault(
    steps: Sequence[Step], *, direction: Direction, owner: Sequence[int], work: Mapping[Tile, int]
) -> Fault | None:
    """The first fault of a schedule, or None if it is valid.

    Args:
        steps: tiles and moves of every step.
        direction: which inputs and results travel.
        owner: ``owner[chunk]`` is the rank that holds the chunk.
        work: every tile that must be computed, with its area.
    """
    replay = _Replay(direction, owner, work)
    num_ranks = max(owner) + 1
    for t, step in enumerate(steps):
        if len(step.tiles) != num_ranks:
            return Fault(t, f"tiles of {len(step.tiles)} ranks, the layout has {num_ranks}")
        made: set[_Item] = set()
        for rank, tiles in enumerate(step.tiles):
            for tile in tiles:
                fault, results = replay.compute(rank, tile)
                if fault is not None:
                    return Fault(t, fault)
                made |= results
        for move in step.moves:
            fault = replay.send(move)
            if fault is not None:
                return Fault(t, fault)
        replay.to_send |= made
        replay.arrived |= {(m.payload, m.chunk, m.dst) for m in step.moves if m.payload not in RESULTS}
    return _leftover(replay, last_step=len(steps) - 1)


def _leftover(replay: _Replay, last_step: int) -> Fault | None:
    """What is missing or unused at the end of a schedule."""
    missing = replay.work.keys() - replay.done
    if missing:
        return Fault(last_step, f"never computed: {' '.join(map(str, sorted(missing)[:8]))}")
    if replay.to_send:
        payload, chunk, rank = min(replay.to_send)
        return Fault(last_step, f"{payload}{chunk} is never sent by rank {rank}")
    unused = replay.arrived - replay.used
    if unused:
        payload, chunk, rank = min(unused)
        return Fault(last_step, f"{payload}{chunk} is sent to rank {rank}, which never uses it")
    return None
