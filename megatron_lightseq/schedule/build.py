"""From a method and a problem to a valid schedule."""

from __future__ import annotations

from collections.abc import Callable

from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule.ir import Direction, Placement, Step, Tile
from megatron_lightseq.schedule.method import Method
from megatron_lightseq.schedule.methods import resolve_method
from megatron_lightseq.schedule.network import Network
from megatron_lightseq.schedule.problem import Problem
from megatron_lightseq.schedule.route import route
from megatron_lightseq.schedule.schedule import Schedule
from megatron_lightseq.schedule.shape import TensorShape


def build(
    method: str | Method,
    layout: SequenceLayout,
    *,
    mask: Mask | None = None,
    direction: str | Direction = Direction.FORWARD,
    seq_length: int | None = None,
    shape: TensorShape | None = None,
    network: Network | None = None,
) -> Schedule:
    """The schedule of one method in one direction: placed, routed and validated.

    Args:
        method: a name that :func:`resolve_method` knows, or a :class:`Method`. If it exchanges heads among u ranks,
            the schedule is that of one of the u rings of P / u ranks.
        layout: how the sequence is cut over the ranks.
        mask: default causal.
        direction: ``forward`` or ``backward``.
        seq_length: tokens in the whole sequence; default: the end of the mask's documents, or 1024 tokens per chunk.
        shape: the attention inputs, for methods whose placement depends on them; default one head of 128.
        network: what transfers run over, for methods whose placement depends on it.

    Raises:
        UnsupportedError: an unknown method, or one that does not work on this layout.
        LayoutError: the sequence does not divide among the ranks.
        ConfigError: the mask is for sequences of another length.
        ScheduleError: the placement loses, repeats or misplaces a tile.
    """
    method = resolve_method(method)
    method.check_layout(layout)
    mask = Mask.causal() if mask is None else mask
    if seq_length is None:
        seq_length = mask.length or method.nominal_length(layout)
    problem = Problem(
        layout=layout,
        mask=mask,
        seq_length=seq_length,
        direction=Direction(direction),
        shape=shape or TensorShape(),
        network=network,
    )
    return solve(method, method.inner_problem(problem))


def solve(method: Method, problem: Problem) -> Schedule:
    """The schedule of a method for an :meth:`Method.inner_problem` of its own.

    Raises:
        ScheduleError: the placement loses, repeats or misplaces a tile.
    """
    return Schedule(
        method=method.name,
        direction=problem.direction,
        layout=problem.layout,
        mask=problem.mask,
        seq_length=problem.seq_length,
        steps=steps_of(method, problem),
    )


def steps_of(method: Method, problem: Problem) -> tuple[Step, ...]:
    """The steps of a method's schedule, placed and routed but not checked: enough for a prediction."""
    placement = drop_empty(method.place(problem), problem.areas)
    return route(placement, problem, relays=method.relays)


def drop_empty(placement: Placement, areas: Callable[[Tile], int]) -> Placement:
    """The placement without tiles that hold no work, and without the steps that are then empty."""
    kept = [[[tile for tile in tiles if areas(tile)] for tiles in row] for row in placement]
    return [row for row in kept if any(row)]
