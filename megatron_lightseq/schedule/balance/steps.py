"""When each block is computed.

The first and the last step are short and hold a rank's own tiles: they hide the first transfers and the results on
their way home. Between them, what helpers compute for others and what needs others' keys is cut at equal shares of the
mean load, blocks of the same node first, because their inputs arrive first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron_lightseq.schedule.balance.blocks import Block, blocks_of
from megatron_lightseq.schedule.balance.solve import Assignment

Steps = list[list[list[Block]]]
"""Blocks by step and rank."""


@dataclass(frozen=True, slots=True)
class _Clock:
    """When the steps end, in pairs of one rank's work."""

    ends: Sequence[float]
    quantum: int

    @staticmethod
    def of(assignment: Assignment, num_steps: int, edge: float) -> _Clock:
        mean = sum(assignment.loads) / len(assignment.loads)
        unit = mean / (num_steps - 2 + 2 * edge)
        ends = [unit * (edge + step) for step in range(num_steps - 1)] + [float("inf")]
        return _Clock(ends, assignment.quantum)

    @property
    def last(self) -> int:
        return len(self.ends) - 1

    def spread(self, block: Block, filled: float, earliest: int, latest: int) -> Iterator[tuple[int, Block]]:
        """The block, begun when ``filled`` pairs are done, cut between queries where steps end."""
        step = earliest
        while step < latest:
            if filled < self.ends[step]:
                head, behind = block.cut(self.ends[step] - filled, self.quantum)
                if head is not None:
                    yield step, head
                    filled += head.area
                if behind is None:
                    return
                block = behind
            step += 1
        yield step, block


def stage(
    assignment: Assignment, *, num_steps: int, edge: float = 0.15, nodes: Sequence[int] | None = None
) -> Steps:
    """The blocks of every step and rank.

    Args:
        assignment: who computes what.
        num_steps: steps with work; at least 3 where anything travels.
        edge: length of the first and the last step, as a share of the others'.
        nodes: the node of every rank; None for one node.
    """
    num_ranks = len(assignment.loads)
    clock = _Clock.of(assignment, num_steps, edge)
    steps: Steps = [[[] for _ in range(num_ranks)] for _ in range(num_steps)]
    for rank, blocks in enumerate(blocks_of(assignment)):
        for step, block in _timed(blocks, rank, assignment.piece_length, clock, nodes or [0] * num_ranks):
            steps[step][rank].append(block)
    return [row for row in steps if any(row)]


def _timed(
    blocks: Sequence[Block], rank: int, length: int, clock: _Clock, nodes: Sequence[int]
) -> Iterator[tuple[int, Block]]:
    def owner(position: int) -> int:
        return position // length % len(nodes)

    def is_own(block: Block) -> bool:
        return owner(block.q_start) == rank and owner(block.k_start) == rank

    own = sorted((b for b in blocks if is_own(b)), key=lambda b: (b.q_start, b.k_start))
    remote = sorted((b for b in blocks if not is_own(b)), key=_nearest_first(rank, owner, nodes))
    total = sum(block.area for block in own)
    head, rest = _cut_at(own, min(clock.ends[0], total / 2), clock.quantum)
    yield from ((0, block) for block in head)
    filled = float(sum(block.area for block in head))
    for block in remote:
        # What belongs to another rank must not be computed in the last step: its results still travel home.
        latest = clock.last - (owner(block.q_start) != rank)
        yield from clock.spread(block, filled, 1, latest)
        filled += block.area
    for block in rest:
        yield from clock.spread(block, filled, 0, clock.last)
        filled += block.area


def _nearest_first(
    rank: int, owner: Callable[[int], int], nodes: Sequence[int]
) -> Callable[[Block], tuple[bool, bool, int, int, int]]:
    """Order: near inputs first, among them what has to go home."""

    def key(block: Block) -> tuple[bool, bool, int, int, int]:
        q_rank, k_rank = owner(block.q_start), owner(block.k_start)
        far = nodes[q_rank] != nodes[rank] or nodes[k_rank] != nodes[rank]
        return far, q_rank == rank, abs(rank - k_rank), block.q_start, block.k_start

    return key


def _cut_at(blocks: Sequence[Block], area: float, quantum: int) -> tuple[list[Block], list[Block]]:
    """The blocks that hold the first ``area`` pairs and those behind; one block may be cut."""
    for i, block in enumerate(blocks):
        if block.area > area:
            head, tail = block.cut(area, quantum)
            before = [*blocks[:i], *([head] if head is not None else [])]
            return before, [*([tail] if tail is not None else []), *blocks[i + 1 :]]
        area -= block.area
    return list(blocks), []
