"""The placement of the `balanced` method: the solver's plan in chunks of the layout."""

from __future__ import annotations

from math import inf
from typing import NamedTuple

from megatron_lightseq.schedule.balance.plan import BalanceOptions, plan_blocks
from megatron_lightseq.schedule.balance.rows import quantum_of
from megatron_lightseq.schedule.balance.solve import Prices
from megatron_lightseq.schedule.ir import Placement, Tile
from megatron_lightseq.schedule.network import Network
from megatron_lightseq.schedule.problem import Problem

BALANCED_LAYOUTS = ("contiguous", "dealt")
"""Layouts of one piece a rank, as the solver assumes."""
TARGET_PERCENT = 100
_LEAST_GRAIN = 4


class _Fineness(NamedTuple):
    """How finely work is balanced on up to so many ranks; found with scripts/measure_schedules.py packed."""

    most_ranks: float
    grain: int
    """Rows of work per piece."""
    steps: int
    """Where more ranks exchange more, shorter steps leave less to wait for."""
    other_steps: tuple[int, ...]
    """Numbers of steps that may be better for some masks and networks."""
    targets: tuple[int, ...] = (100, 103, 110, 125, 150, 170)
    """Percent of the mean load. Some imbalance is better where moving work costs more than it saves."""


_FINENESS = (
    _Fineness(8, 32, 6, (4, 8, 12)),
    _Fineness(16, 32, 10, (4, 6, 8, 14)),
    _Fineness(64, 16, 16, (4, 6, 8, 12)),
    _Fineness(inf, 16, 16, (), (100, 125, 170)),  # a plan takes tenths of a second
)


def _fineness(cp_size: int) -> _Fineness:
    return next(entry for entry in _FINENESS if cp_size <= entry.most_ranks)


_MOST_EXPENSIVE = 8.0
"""Transfers between nodes are taken to cost at most this many times those within a node."""


def balanced_variants(cp_size: int) -> list[tuple[int, int]]:
    """Numbers of steps and targets in percent that are worth comparing with the defaults, in simulation."""
    fine = _fineness(cp_size)
    pairs = [(steps, percent) for steps in (fine.steps, *fine.other_steps) for percent in fine.targets]
    return pairs[1:]


def splits_of(problem: Problem) -> int:
    """Chunks per piece, such that every possible cut is at a chunk border."""
    return max(1, _piece_length(problem) // _quantum(problem))


def _piece_length(problem: Problem) -> int:
    return problem.seq_length // (problem.layout.cp_size * problem.layout.batch_rows)


def _quantum(problem: Problem) -> int:
    """Tokens that cuts are multiples of. Pieces that its chunks do not divide are not cut at all."""
    length = _piece_length(problem)
    if problem.chunk is None:
        return quantum_of(length)
    return problem.chunk if length % problem.chunk == 0 else length


def place_balanced(
    problem: Problem, num_steps: int | None = None, target_percent: int = TARGET_PERCENT
) -> Placement:
    """Owners compute, and ranks with little work take rectangles of it over from ranks with much (``solve.py``).

    Args:
        problem: what to place; its shape sets the prices of moving queries and keys, its network the nodes.
        num_steps: steps with work; default: more on more ranks.
        target_percent: ranks are filled up to this share of the mean load. More than 100 leaves some imbalance where
            moving work costs more than it saves.
    """
    layout, network, quantum = problem.layout, problem.network, _quantum(problem)
    owners = [layout.owner[piece * layout.splits] for piece in range(layout.cp_size)]
    fine = _fineness(len(owners))
    options = BalanceOptions(
        prices=prices_of(problem),
        nodes=tuple(0 if network is None else network.node(rank) for rank in owners),
        batch_rows=layout.batch_rows,
        quantum=quantum,
        grain=max(_LEAST_GRAIN, fine.grain // layout.batch_rows),
        num_steps=max(3, num_steps or fine.steps),
        target=target_percent / 100,
    )
    blocks = plan_blocks(problem.mask, problem.seq_length, options)
    placement: Placement = [
        [[] for _ in owners] for _ in range(1 + max((block.step for block in blocks), default=-1))
    ]
    for block in blocks:
        tile = Tile(
            block.q_start // quantum,
            block.k_start // quantum,
            (block.q_stop - block.q_start) // quantum,
            (block.k_stop - block.k_start) // quantum,
        )
        placement[block.step][owners[block.rank]].append(tile)
    return placement


def prices_of(problem: Problem) -> Prices:
    """Prices in bytes per token of what travels in the problem's direction."""
    query, key = problem.shape.bytes_per_side(problem.direction)
    return Prices(query=float(query), key=float(key), far=_far(problem.network))


def _far(network: Network | None) -> float:
    """How many times as long a transfer between nodes takes, all ranks of a node sending at the same time."""
    if network is None or network.ranks_per_node is None:
        return 1.0
    share = network.nic_bytes_per_s / network.ranks_per_node
    return min(_MOST_EXPENSIVE, max(1.0, network.link_bytes_per_s / share))
