"""Derives every transfer from a placement: an input travels in the step before its first use, a result in the step
after its last contribution, each once. If all tiles of a chunk are computed in one step, two buffers are enough.

With relays, an input may be sent by any rank that holds it by then: preferably one of the same node, and among
those the one with the least to send in that step. A chunk that several ranks of another node need is then sent to
that node once, one step early, and forwarded within the node.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from megatron_lightseq.schedule.intervals import Intervals
from megatron_lightseq.schedule.ir import DATAFLOW, Move, Payload, Placement, Step, Tile
from megatron_lightseq.schedule.problem import Problem


@dataclass(frozen=True, slots=True, order=True)
class _Need:
    """An input that a rank must receive."""

    step: int
    """The step in which it travels, at the latest."""
    payload: Payload
    start: int
    stop: int
    rank: int


def route(placement: Placement, problem: Problem, *, relays: bool = False) -> tuple[Step, ...]:
    """Add the moves to the steps of a placement.

    Args:
        placement: tiles by step and rank, all of them with work.
        problem: its layout says which rank owns which chunk, its direction which inputs and results travel, and its
            network which ranks share a node.
        relays: whether ranks may forward inputs that they received.

    Returns:
        The steps. If the first tiles need remote inputs, a step without tiles comes before them; if the last tiles
        produce results for other ranks, one comes after them.
    """
    needs = sorted(_inputs(placement, problem))
    sources = (
        _relayed(needs, problem) if relays else [(need.step, _from_owner(need, problem)) for need in needs]
    )
    results = list(_results(placement, problem))
    lead = -min((step for step, _ in sources), default=0)
    tail = int(any(step == len(placement) for step, _ in results))
    num_ranks = problem.layout.cp_size
    nothing: list[list[Tile]] = [[] for _ in range(num_ranks)]
    rows = [nothing] * lead + placement + [nothing] * tail
    moves: list[list[Move]] = [[] for _ in rows]
    for step, move in (*sources, *results):
        moves[step + lead].append(move)
    return tuple(
        Step(tuple(tuple(tiles) for tiles in row), tuple(sorted(ms)))
        for row, ms in zip(rows, moves, strict=True)
    )


def _inputs(placement: Placement, problem: Problem) -> Iterator[_Need]:
    """The inputs that every rank must receive, and the step in which each must travel: the one before its first
    use."""
    flow = DATAFLOW[problem.direction]
    present: dict[tuple[Payload, int], Intervals] = defaultdict(Intervals)
    for t, row in enumerate(placement):
        for rank, tiles in enumerate(row):
            for tile in tiles:
                for payload, chunks in ((flow.q_input, tile.q_chunks), (flow.k_input, tile.k_chunks)):
                    if problem.layout.owner[chunks.start] != rank:
                        for start, stop in present[payload, rank].add(chunks.start, chunks.stop):
                            yield _Need(t - 1, payload, start, stop, rank)


def _results(placement: Placement, problem: Problem) -> Iterator[tuple[int, Move]]:
    """Every result that is sent to its owner, and the step in which it travels: the one after its last
    contribution."""
    flow = DATAFLOW[problem.direction]
    owner = problem.layout.owner
    later: dict[tuple[Payload, int], Intervals] = defaultdict(Intervals)
    for t in reversed(range(len(placement))):
        for rank, tiles in enumerate(placement[t]):
            for tile in tiles:
                for payload, chunks in ((flow.q_result, tile.q_chunks), (flow.k_result, tile.k_chunks)):
                    if payload is not None and owner[chunks.start] != rank:
                        for start, stop in later[payload, rank].add(chunks.start, chunks.stop):
                            yield t + 1, Move(payload, start, rank, owner[start], stop - start)


def _from_owner(need: _Need, problem: Problem) -> Move:
    return Move(need.payload, need.start, problem.layout.owner[need.start], need.rank, need.stop - need.start)


@dataclass(slots=True)
class _Holders:
    """Which ranks hold which inputs from which step on, and how much each rank sends in each step."""

    problem: Problem
    received: dict[tuple[Payload, int], list[tuple[int, _Need]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    """Inputs by payload and owner: the step in which they travel, and which they are."""
    load: dict[tuple[int, int], int] = field(default_factory=lambda: defaultdict(int))
    """Chunks that a rank sends in a step."""

    def node(self, rank: int) -> int:
        """The node of a rank; all ranks share one if the network is not known."""
        return 0 if self.problem.network is None else self.problem.network.node(rank)

    def source(self, need: _Need, step: int) -> int:
        """The rank that should send ``need`` in ``step``."""
        owner = self.problem.layout.owner[need.start]
        sent = self.received[need.payload, owner]
        ranks = [
            other.rank
            for when, other in sent
            if when < step and other.start <= need.start and other.stop >= need.stop
        ]
        return min(
            (owner, *ranks),
            key=lambda rank: (self.node(rank) != self.node(need.rank), self.load[step, rank], rank),
        )

    def send(self, need: _Need, step: int, src: int) -> tuple[int, Move]:
        """Record that ``src`` sends ``need`` in ``step``."""
        owner = self.problem.layout.owner[need.start]
        self.received[need.payload, owner].append((step, need))
        self.load[step, src] += need.stop - need.start
        return step, Move(need.payload, need.start, src, need.rank, need.stop - need.start)


def _relayed(needs: Sequence[_Need], problem: Problem) -> list[tuple[int, Move]]:
    """A source for every need, in order of time. Of several ranks of another node, the first one receives a step
    early."""
    holders = _Holders(problem)
    crossing: dict[tuple[Payload, int, int, int], int] = {}
    for need in needs:
        key = (need.payload, need.start, need.stop, holders.node(need.rank))
        crossing[key] = crossing.get(key, 0) + 1
    moves = []
    for need in needs:
        owner = problem.layout.owner[need.start]
        node = holders.node(need.rank)
        step, src = need.step, holders.source(need, need.step)
        several = crossing[need.payload, need.start, need.stop, node] > 1
        if several and holders.node(src) != node and holders.node(owner) != node and step > 0:
            step -= 1
            src = holders.source(need, step)
        moves.append(holders.send(need, step, src))
    return moves
