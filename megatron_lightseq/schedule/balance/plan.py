"""Plans of the `balanced` placement: by the solver in C++ where the extension is built, else by the one in Python.

Both make the same plan, so ranks agree whichever they use.
"""

from __future__ import annotations

import importlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule.balance.rows import Row, causal_documents, quantum_of, row_borders, rows_of
from megatron_lightseq.schedule.balance.solve import Prices, solve
from megatron_lightseq.schedule.balance.steps import stage


class PlannedBlock(NamedTuple):
    """One rectangle of work: queries ``[q_start, q_stop)`` against keys ``[k_start, k_stop)``, in tokens."""

    step: int
    rank: int
    """The rank that computes it, counted in the order in which ranks hold the pieces of the sequence."""
    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    area: int
    """Allowed pairs, nearly: the solver counts parts of rows in proportion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceOptions:
    """What the solver is told besides the mask."""

    prices: Prices
    nodes: tuple[int, ...]
    """The node of the rank that holds each piece of a row; as many as there are ranks."""
    batch_rows: int = 1
    """Sequences one after the other, each in as many pieces as there are ranks."""
    quantum: int | None = None
    """Tokens that all cuts are multiples of; None: :func:`quantum_of` of a piece."""
    grain: int = 16
    """Rows of work per piece: more balance better and take longer to plan."""
    num_steps: int = 8
    target: float = 1.0
    tolerance: float = 0.02
    edge: float = 0.4
    """Length of the first and the last step, as a share of the others'."""


def plan_blocks(mask: Mask, seq_length: int, options: BalanceOptions) -> list[PlannedBlock]:
    """Who computes which block at which step; every pair that ``mask`` allows is in exactly one block.

    Args:
        mask: what queries see; of documents, borders that end at ``seq_length``.
        seq_length: tokens over all ranks, a multiple of the number of pieces.
        options: prices, nodes, and how finely to balance.
    """
    native = _native()
    if native is None:
        return plan_in_python(mask, seq_length, options)
    arguments = {
        "query": options.prices.query,
        "key": options.prices.key,
        "far": options.prices.far,
        "nodes": options.nodes,
        "target": options.target,
        "tolerance": options.tolerance,
        "num_steps": options.num_steps,
        "edge": options.edge,
    }
    quantum = options.quantum or quantum_of(seq_length // (len(options.nodes) * options.batch_rows))
    documents = causal_documents(mask, seq_length)
    if documents is not None:
        packed = native.plan_documents(documents, options.grain, options.batch_rows, quantum, **arguments)
    else:
        rows = [_as_tuple(row) for row in _rows(mask, seq_length, options)]
        packed = native.plan_rows(rows, options.grain, quantum, **arguments)
    return _without_empty_steps([PlannedBlock(*fields) for fields in struct.iter_unpack("7q", packed)])


def plan_in_python(mask: Mask, seq_length: int, options: BalanceOptions) -> list[PlannedBlock]:
    """The same plan as :func:`plan_blocks`, by the solver in Python: its oracle."""
    assignment = solve(
        _rows(mask, seq_length, options),
        grain=options.grain,
        prices=options.prices,
        nodes=options.nodes,
        target=options.target,
        tolerance=options.tolerance,
        quantum=options.quantum,
    )
    steps = stage(assignment, num_steps=options.num_steps, edge=options.edge, nodes=options.nodes)
    return [
        PlannedBlock(step, rank, b.q_start, b.q_stop, b.k_start, b.k_stop, b.area)
        for step, row in enumerate(steps)
        for rank, blocks in enumerate(row)
        for b in blocks
    ]


def _rows(mask: Mask, seq_length: int, options: BalanceOptions) -> list[Row]:
    num_pieces = len(options.nodes) * options.batch_rows
    return rows_of(mask, row_borders(seq_length, num_pieces, options.grain, options.quantum))


def _as_tuple(row: Row) -> tuple[int, int, Sequence[int], Sequence[int], int, int, int]:
    return row.start, row.stop, row.edges, row.sums, row.shared, row.document, row.density


def _without_empty_steps(blocks: list[PlannedBlock]) -> list[PlannedBlock]:
    """In order of step and rank; steps that hold no block are left out."""
    number = {step: index for index, step in enumerate(sorted({block.step for block in blocks}))}
    if len(number) <= max(number, default=-1):
        blocks = [block._replace(step=number[block.step]) for block in blocks]
    return sorted(blocks, key=lambda block: block[:2])


def _native() -> ModuleType | None:
    try:
        return importlib.import_module("megatron_lightseq._plan")
    except ImportError:
        return None
