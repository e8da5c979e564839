"""From the name of a method to a valid schedule."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule.ir import Direction, Placement, Tile
from megatron_lightseq.schedule.place import METHODS, Method, mesh, usp
from megatron_lightseq.schedule.route import route
from megatron_lightseq.schedule.schedule import Schedule, work_of

NOMINAL_CHUNK_LENGTH = 1024
"""Tokens a chunk is taken to have when a schedule is looked at without a sequence length."""


_WITH_SIZES = re.compile(r"(?:mesh:(?P<rows>[1-9]\d*)x(?P<columns>[1-9]\d*))|(?:usp:(?P<ulysses>[1-9]\d*))")


def resolve_method(method: str | Method) -> Method:
    """The method of that name; a :class:`Method` is returned as it is.

    Beside the names in ``METHODS``: ``mesh:4x2`` for a process mesh of 4 rows and 2 columns, ``usp:4`` for heads
    exchanged among 4 ranks.

    Raises:
        UnsupportedError: no method has that name; the message gives the nearest.
    """
    if isinstance(method, Method):
        return method
    if match := _WITH_SIZES.fullmatch(method):
        if match["ulysses"]:
            return usp(int(match["ulysses"]))
        return mesh(int(match["rows"]), int(match["columns"]))
    if method not in METHODS:
        near = difflib.get_close_matches(method, METHODS, n=1)
        raise UnsupportedError(
            explain(
                got=f"method {method!r}",
                rule=f"the methods are {', '.join(METHODS)}, mesh:ROWSxCOLUMNS and usp:SIZE",
                remedy=f"Did you mean {near[0]!r}"
                if near
                else "Choose one of them, or pass a schedule.Method",
            )
        )
    return METHODS[method]


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
        ScheduleError: the placement loses, repeats or misplaces a tile.
    """
    method = resolve_method(method)
    method.check_layout(layout)
    layout = method.inner_layout(layout)
    mask = Mask.causal() if mask is None else mask
    if seq_length is None:
        seq_length = mask.cu_seqlens[-1] if mask.cu_seqlens else layout.num_chunks * NOMINAL_CHUNK_LENGTH
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
