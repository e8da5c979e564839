"""Placements: which rank computes which tile, when. Each is a short pure function; the rest is derived.

A placement may name tiles that the mask leaves empty: they are dropped before routing, and so are steps that
become empty. Distances are counted in ranks: at *distance* t, rank r's queries meet the keys of rank r - t.
"""

from __future__ import annotations

from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule.ir import Placement, Tile


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


LIGHTSEQ_LAYOUTS = ("contiguous",)
"""Layouts on which a rank's causal work grows with its number, as :func:`place_lightseq` assumes."""


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


def place_all_gather(layout: SequenceLayout, mask: Mask) -> Placement:
    """Every rank receives all keys and values it may need at once, and computes its own queries against them.

    One transfer step, behind the local tiles, for any number of ranks: best where latency counts and memory for
    the whole sequence's keys is there (Llama 3's context parallelism, arXiv 2407.21783, 3.3.2).
    """
    size = layout.cp_size
    remote = [
        [tile for k_rank in range(size) if k_rank != rank for tile in all_tiles(layout, rank, k_rank)]
        for rank in range(size)
    ]
    return with_local_ends(layout, [remote] if size > 1 else [])


def mesh_rows(size: int, row_cost: float = 3.0, column_cost: float = 2.0) -> int:
    """Rows a of the a x b process mesh that moves least: ``row_cost (b - 1) + column_cost (a - 1)``.

    The costs are what a rank transfers for each other rank of its row (queries and results) and of its column
    (keys and values). The defaults are those of a forward pass without grouped queries, in bf16 with fp32 results.
    """
    shapes = [rows for rows in range(1, size + 1) if size % rows == 0]
    return min(shapes, key=lambda rows: row_cost * (size // rows - 1) + column_cost * (rows - 1))


def place_mesh(layout: SequenceLayout, mask: Mask, rows: int | None = None) -> Placement:
    """The P x P grid of rank pairs cut into P rectangles: a rank takes (queries of its row, keys of its column).

    Rank x b + y stands at (x, y) of an a x b mesh. It receives the queries of the b ranks of its row and the keys
    of the a ranks of its column, each once, and sends one result for each chunk of queries: volume O(sqrt(P)).
    Every pair of ranks has equal causal work on the zigzag layout, nearly so on the striped one.

    Keys stream in while the rank computes its own queries; from then on queries arrive, meet all keys of the
    column and leave, one rank's a step. A pair of its own is kept for the end, beside the last result on its way.
    """
    size = layout.cp_size
    rows = rows or mesh_rows(size)
    columns = size // rows

    def pair(rank: int, right: int, down: int) -> list[Tile]:
        x, y = divmod(rank, columns)
        return all_tiles(layout, x * columns + (y + right) % columns, (x + down) % rows * columns + y)

    own = [[pair(rank, 0, down) for rank in range(size)] for down in range(rows)]
    others = [
        [[tile for down in range(rows) for tile in pair(rank, right, down)] for rank in range(size)]
        for right in range(1, columns)
    ]
    if rows == 1:
        return with_local_ends(layout, others)
    return [*own[:-1], *others, own[-1]]


def place_usp(layout: SequenceLayout, mask: Mask) -> Placement:
    """What runs between the groups that exchange heads: lightseq on contiguous shards, the ring elsewhere."""
    return (place_lightseq if layout.name in LIGHTSEQ_LAYOUTS else place_ring)(layout, mask)
