"""From the name of a method to a valid schedule."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule.ir import Direction, Placement, Tile
from megatron_lightseq.schedule.method import Method
from megatron_lightseq.schedule.methods import resolve_method
from megatron_lightseq.schedule.route import route
from megatron_lightseq.schedule.schedule import Schedule, work_of

NOMINAL_CHUNK_LENGTH = 1024
"""Tokens a chunk is taken to have when a schedule is looked at without a sequence length."""


def build(
    method: str | Method,
    layout: SequenceLayout,
    *,
    mask: Mask | None = None,
    direction: str | Direction = Direction.FORWARD,
    seq_length: int | None = None,
) -> Schedule:
    """Place, route and validate.

    Args:
        method: a name that :func:`resolve_method` knows, or a :class:`Method` of your own. With heads exchanged
            among u ranks, the schedule is that of one of the u rings of P / u ranks.
        layout: how the sequence is cut over the ranks.
        mask: default causal.
        direction: ``forward`` or ``backward``; both are routed from the same placement.
        seq_length: tokens in the whole sequence; without it, chunks are taken to be 1024 tokens long.

    Raises:
        UnsupportedError: unknown method, or one that does not work on this layout.
        LayoutError: the sequence does not divide among the ranks.
        ConfigError: the mask is for sequences of another length.
        ScheduleError: the placement loses, repeats or misplaces a tile.
    """
    method = resolve_method(method)
    method.check_layout(layout)
    layout = method.inner_layout(layout)
    mask = Mask.causal() if mask is None else mask
    if seq_length is None:
        seq_length = mask.length or layout.num_chunks * NOMINAL_CHUNK_LENGTH
    layout.check_length(seq_length)
    direction = Direction(direction)
    placement = drop_empty(method.place(layout, mask), work_of(layout, mask, seq_length))
    return Schedule(
        method=method.name,
        direction=direction,
        layout=layout,
        mask=mask,
        seq_length=seq_length,
        steps=route(layout.owner, placement, direction),
    )


def drop_empty(placement: Placement, work: Mapping[Tile, int]) -> Placement:
    """The placement without tiles that hold no work and without steps that then hold no tile."""
    kept = [[[tile for tile in tiles if tile in work] for tiles in row] for row in placement]
    return [row for row in kept if any(row)]
