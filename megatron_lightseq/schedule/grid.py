"""A rank's program on a grid: one call per leaf, and transfers of results that carry nodes (:mod:`joins`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_lightseq.errors import LayoutError, explain
from megatron_lightseq.schedule.ir import DATAFLOW, RESULTS, Payload, Tile
from megatron_lightseq.schedule.joins import Joins, Node, nodes_of
from megatron_lightseq.schedule.problem import Problem
from megatron_lightseq.schedule.program import Call, Operand, Program, ProgramStep, Transfer
from megatron_lightseq.schedule.schedule import Schedule

_Results = tuple[Payload, int]
"""What the leaves of one tree are joined to: a payload of one grid chunk."""


def check_grid(method: str, problem: Problem) -> None:
    """Refuse parts of shards that are no whole chunks.

    Args:
        method: its name, for the message.
        problem: with a chunk size, and with the layout that the method divides (:meth:`Method.inner_problem`).

    Raises:
        LayoutError: a chunk of the layout is not a multiple of the problem's chunk of adjacent tokens.
    """
    layout, chunk = problem.layout, problem.chunk
    assert chunk is not None, "a grid has chunks of some size"
    part = layout.chunk_positions(0, problem.seq_length)
    if chunk >= 1 and len(part) % chunk == 0 and part.step == 1:
        return
    rule = "every part is made of whole chunks of adjacent tokens, so that all numbers of ranks sum up alike"
    remedy = f"Choose a chunk that divides {len(part)}"
    if part.step != 1:
        rule, remedy = f"{rule}; striped shards are not", "Choose the contiguous or the zigzag layout"
    got = (
        f"a fixed order of sums over chunks of {chunk} tokens, for method {method} on {layout} with "
        f"{problem.seq_length} tokens, in parts of {len(part)}"
    )
    raise LayoutError(explain(got=got, rule=rule, remedy=remedy))


def on_grid(program: Program, schedule: Schedule, chunk: int) -> Program:
    """The program with calls and results of ``chunk`` tokens, joined in an order that the sequence alone determines.

    Args:
        program: of one rank, compiled from ``schedule``.
        schedule: of all ranks; it says which leaves each of them computes. Its parts are whole chunks
            (:func:`check_grid`).
        chunk: tokens of a grid chunk.
    """
    leaves = _Leaves.of(schedule, chunk)
    carried: dict[int, tuple[tuple[int, Node], ...]] = {}

    def with_nodes(transfers: Sequence[Transfer], is_sent: bool) -> Iterator[Transfer]:
        for transfer in transfers:
            if transfer.payload not in RESULTS:
                yield transfer
                continue
            source = program.rank if is_sent else transfer.peer
            nodes = carried[transfer.tag] = tuple(leaves.nodes(transfer, source, schedule))
            if nodes:
                yield replace(transfer, start=0, length=len(nodes) * chunk)

    steps = []
    for step in program.steps:
        calls = tuple(leaf for call in step.calls for leaf in _leaf_calls(call, schedule, chunk))
        sends, receives = tuple(with_nodes(step.sends, True)), tuple(with_nodes(step.receives, False))
        steps.append(ProgramStep(calls, sends, receives, step.last_uses))
    joins = Joins(chunk, leaves.everyone, carried, tuple(_own_chunks(program, schedule, chunk)))
    return replace(program, steps=tuple(steps), blanks=(), joins=joins)


@dataclass(frozen=True, slots=True)
class _Leaves:
    """Which leaves there are, and which rank computes them."""

    chunk: int
    by_rank: Mapping[int, Mapping[_Results, Sequence[int]]]
    everyone: Mapping[_Results, tuple[int, ...]]

    @staticmethod
    def of(schedule: Schedule, chunk: int) -> _Leaves:
        flow = DATAFLOW[schedule.direction]
        by_rank: dict[int, dict[_Results, list[int]]] = defaultdict(lambda: defaultdict(list))
        everyone: dict[_Results, list[int]] = defaultdict(list)
        for step in schedule.steps:
            for rank, tiles in enumerate(step.tiles):
                for i, j in (pair for tile in tiles for pair in _pairs(tile, schedule, chunk)):
                    for payload, x, leaf in ((flow.q_result, i, j), (flow.k_result, j, i)):
                        if payload is not None:
                            by_rank[rank][payload, x].append(leaf)
                            everyone[payload, x].append(leaf)
        return _Leaves(chunk, by_rank, {results: tuple(sorted(found)) for results, found in everyone.items()})

    def nodes(self, transfer: Transfer, source: int, schedule: Schedule) -> Iterator[tuple[int, Node]]:
        """What ``source`` sends: for each grid chunk of the span the nodes that it has, in order."""
        positions = schedule.areas.positions
        first = positions(transfer.span.first).start // self.chunk
        end = positions(transfer.span.stop - 1).stop // self.chunk
        for x in range(first, end):
            computed = self.by_rank[source].get((transfer.payload, x), ())
            if computed:
                for node in nodes_of(computed, self.everyone[transfer.payload, x]):
                    yield x, node


def _pairs(tile: Tile, schedule: Schedule, chunk: int) -> Iterator[tuple[int, int]]:
    """The pairs of grid chunks in a tile that hold work."""
    areas = schedule.areas
    queries, keys = areas.positions(tile.q, tile.queries), areas.positions(tile.k, tile.keys)
    for i in range(queries.start // chunk, queries.stop // chunk):
        for j in range(keys.start // chunk, keys.stop // chunk):
            if areas.between(_positions(i, chunk), _positions(j, chunk)):
                yield i, j


def _positions(x: int, chunk: int) -> range:
    return range(x * chunk, (x + 1) * chunk)


def _leaf_calls(call: Call, schedule: Schedule, chunk: int) -> Iterator[Call]:
    """A call as one call per leaf, row by row, so that few nodes are waiting for their siblings at a time."""
    for q_at in range(0, len(call.q_positions), chunk):
        for k_at in range(0, len(call.k_positions), chunk):
            queries, keys = call.q_positions[q_at : q_at + chunk], call.k_positions[k_at : k_at + chunk]
            area = schedule.areas.between(queries, keys)
            if area:
                yield Call(
                    q=_part(call.q, q_at, chunk),
                    k=_part(call.k, k_at, chunk),
                    q_result=_part(call.q_result, q_at, chunk),
                    k_result=None if call.k_result is None else _part(call.k_result, k_at, chunk),
                    q_positions=queries,
                    k_positions=keys,
                    area=area,
                    fresh=True,
                )


def _part(operand: Operand, at: int, length: int) -> Operand:
    return replace(operand, start=operand.start + at, stop=operand.start + at + length)


def _own_chunks(program: Program, schedule: Schedule, chunk: int) -> Iterator[tuple[int, int]]:
    """The grid chunks of the rank's shard, and where each begins in it."""
    at = 0
    for part in schedule.layout.chunks_of(program.rank):
        positions = schedule.areas.positions(part)
        for x in range(positions.start // chunk, positions.stop // chunk):
            yield x, at
            at += chunk
