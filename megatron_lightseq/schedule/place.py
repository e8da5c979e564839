"""Placements: which rank computes which tile, when. Each is a short pure function; the rest is derived.

A placement may name tiles that the mask leaves empty: they are dropped before routing, and so are steps that
become empty. Distances are counted in ranks: at *distance* t, rank r's queries meet the keys of rank r - t.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.layout import LAYOUT_NAMES, SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule.ir import Placement, Tile


@dataclass(frozen=True, slots=True)
class Method:
    """A way to share attention among ranks: a placement, and the layouts it is right for.

    Pass one as ``method=`` anywhere a name is accepted to use a placement of your own.
    """

    name: str
    place: Callable[[SequenceLayout, Mask], Placement]
    layouts: tuple[str, ...] = LAYOUT_NAMES
    """Names of the layouts it accepts."""
    splits: int = 1
    """Adjacent chunks that each of a layout's pieces is addressed as; more than one allows finer tiles."""

    def check_layout(self, layout: SequenceLayout) -> None:
        """Raise :class:`UnsupportedError` unless this method computes from shards cut by ``layout``."""
        if layout.name not in self.layouts:
            raise UnsupportedError(
                explain(
                    got=f"method {self.name!r} on the {layout.name} layout",
                    rule=f"{self.name} works on {' or '.join(self.layouts)} shards",
                    remedy=f"Cut the sequence with layout={self.layouts[0]!r}, or choose method='ring'",
                )
            )


def all_tiles(layout: SequenceLayout, q_rank: int, k_rank: int) -> list[Tile]:
    """Every tile of one rank's queries against another's keys."""
    return [Tile(q, k) for q in layout.chunks_of(q_rank) for k in layout.chunks_of(k_rank)]


def with_local_ends(layout: SequenceLayout, remote_steps: Placement) -> Placement:
    """Put each rank's own tiles around the remote steps: some before, to hide the first transfer that comes in
    behind, and the diagonal ones after, to hide the last result going home.
    """
    local = [all_tiles(layout, rank, rank) for rank in range(layout.cp_size)]
    if not remote_steps or layout.num_chunks == layout.cp_size:  # nothing to hide, or nothing to divide
        return [local, *remote_steps]
    first = [[tile for tile in tiles if tile.q != tile.k] for tiles in local]
    last = [[tile for tile in tiles if tile.q == tile.k] for tiles in local]
    return [first, *remote_steps, last]


def place_ring(layout: SequenceLayout, mask: Mask) -> Placement:
    """Every rank computes its own queries against the keys of rank after rank (DistFlashAttn, Algorithm 1).

    Balanced if the layout is; on contiguous shards a causal mask leaves half of the ranks' time unused.
    """
    size = layout.cp_size
    return with_local_ends(
        layout,
        [[all_tiles(layout, rank, (rank - t) % size) for rank in range(size)] for t in range(1, size)],
    )


def place_lightseq(layout: SequenceLayout, mask: Mask) -> Placement:
    """Ranks that have run out of keys compute for the ranks that have too many (DistFlashAttn, Algorithm 2).

    At distance t, rank r < t has no keys left that a causal mask allows; it takes over the queries of rank
    P + r - t, which meet its own keys. For even P the last distance P/2 has work for half of the ranks only:
    its queries are divided between owner and helper, so that the makespan is P/2 chunk tiles for every P.
    """
    if not mask.is_causal:  # every rank has equal work: nothing to help with
        return place_ring(layout, mask)
    size = layout.cp_size

    def remote(rank: int, t: int) -> list[Tile]:
        if 2 * t == size:
            owner = rank if rank >= t else rank + t
            tiles = all_tiles(layout, owner, owner - t)
            half = len(tiles) // 2  # tiles come in query order: helpers take the earlier half
            return tiles[half:] if rank >= t else tiles[:half]
        if t <= rank:
            return all_tiles(layout, rank, rank - t)
        return all_tiles(layout, size + rank - t, rank)

    steps = [[remote(rank, t) for rank in range(size)] for t in range(1, size // 2 + 1)]
    return with_local_ends(layout, steps)


METHODS = {
    method.name: method
    for method in (
        Method("lightseq", place_lightseq, layouts=("contiguous",), splits=2),
        Method("ring", place_ring),
        Method("zigzag", place_ring, layouts=("zigzag",)),
    )
}
