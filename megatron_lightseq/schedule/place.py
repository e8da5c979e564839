"""Placements: which rank computes which tile at which step. Each is a short pure function; everything else is
derived.

A placement may name tiles that the mask leaves empty: they are dropped before routing, and so are steps that become
empty. Distances are counted in ranks: at *distance* t, rank r's queries meet the keys of rank r - t.
"""

from __future__ import annotations

from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.schedule.ir import Placement, Tile
from megatron_lightseq.schedule.problem import Problem


def all_tiles(layout: SequenceLayout, q_rank: int, k_rank: int) -> list[Tile]:
    """Every tile of one rank's queries against another's keys, of the same row."""
    q_chunks, k_chunks = layout.chunks_of(q_rank), layout.chunks_of(k_rank)
    if layout.batch_rows == 1:
        return [Tile(q, k) for q in q_chunks for k in k_chunks]
    return [Tile(q, k) for q in q_chunks for k in k_chunks if layout.row_of(q) == layout.row_of(k)]


def with_local_ends(layout: SequenceLayout, remote_steps: Placement) -> Placement:
    """Put each rank's own tiles around the remote steps: some before, to overlap the first transfers, and the
    diagonal ones after, to overlap the transfer of the last results.
    """
    local = [all_tiles(layout, rank, rank) for rank in range(layout.cp_size)]
    if (
        not remote_steps or layout.num_chunks == layout.cp_size * layout.batch_rows
    ):  # nothing to hide, or nothing to divide
        return [local, *remote_steps]
    first = [[tile for tile in tiles if tile.q != tile.k] for tiles in local]
    last = [[tile for tile in tiles if tile.q == tile.k] for tiles in local]
    return [first, *remote_steps, last]


def place_ring(problem: Problem) -> Placement:
    """Every rank computes its own queries against the keys of one rank after another (DistFlashAttn, Algorithm 1).

    Balanced if the layout is; on contiguous shards, a causal mask leaves the ranks idle for almost half of the time.
    """
    layout, size = problem.layout, problem.layout.cp_size
    return with_local_ends(
        layout,
        [[all_tiles(layout, rank, (rank - t) % size) for rank in range(size)] for t in range(1, size)],
    )


LIGHTSEQ_LAYOUTS = ("contiguous",)
"""Layouts on which a rank's causal work grows with its number, as :func:`place_lightseq` assumes."""


def place_lightseq(problem: Problem) -> Placement:
    """Ranks that have no work left compute for ranks that have too much (DistFlashAttn, Algorithm 2).

    At distance t, a causal mask leaves rank r < t no more keys to attend to. It computes for rank P + r - t
    instead, whose queries meet its own keys. For even P, the last distance P/2 has work for only half of the ranks:
    its queries are divided between owner and helper, so that the makespan is P/2 tiles of one rank's tokens for
    every P.
    """
    if not problem.mask.is_causal:  # every rank has equal work: nothing to help with
        return place_ring(problem)
    layout, size = problem.layout, problem.layout.cp_size

    def remote(rank: int, t: int) -> list[Tile]:
        if 2 * t == size:
            owner = rank if rank >= t else rank + t
            tiles = all_tiles(layout, owner, owner - t)
            half = len(tiles) // 2  # tiles are in query order: helpers take the earlier half
            return tiles[half:] if rank >= t else tiles[:half]
        if t <= rank:
            return all_tiles(layout, rank, rank - t)
        return all_tiles(layout, size + rank - t, rank)

    steps = [[remote(rank, t) for rank in range(size)] for t in range(1, size // 2 + 1)]
    return with_local_ends(layout, steps)


def place_all_gather(problem: Problem) -> Placement:
    """Every rank receives all the keys and values it needs in one step, and computes its own queries against them.

    For any number of ranks there is one transfer step, overlapped with the local tiles. Best where latency
    dominates and the keys of the whole sequence fit in memory (Llama 3's context parallelism, arXiv 2407.21783,
    section 3.3.2).
    """
    layout, size = problem.layout, problem.layout.cp_size
    remote = [
        [tile for k_rank in range(size) if k_rank != rank for tile in all_tiles(layout, rank, k_rank)]
        for rank in range(size)
    ]
    return with_local_ends(layout, [remote] if size > 1 else [])


def mesh_rows(size: int, row_cost: float = 3.0, column_cost: float = 2.0) -> int:
    """The number of rows a of the a x b process mesh that minimises ``row_cost (b - 1) + column_cost (a - 1)``.

    The costs are what a rank transfers for each other rank of its row (queries and results) and of its column (keys
    and values). The defaults are those of a forward pass without grouped queries, in bf16 with fp32 results.
    """
    shapes = [rows for rows in range(1, size + 1) if size % rows == 0]
    return min(shapes, key=lambda rows: row_cost * (size // rows - 1) + column_cost * (rows - 1))


def place_mesh(problem: Problem, rows: int | None = None) -> Placement:
    """Cut the P x P grid of rank pairs into P rectangles: each rank computes the queries of its row against the
    keys of its column.

    Rank x b + y is at (x, y) in an a x b mesh. It receives the queries of the b ranks of its row and the keys of
    the a ranks of its column, each once, and sends back one result for each chunk of queries: O(sqrt(P)) bytes per
    rank. Every pair of ranks has equal causal work on the zigzag layout, and nearly equal work on the striped one.

    The keys arrive while the rank computes its own queries. After that, one rank's queries arrive per step, meet
    all keys of the column, and their results leave. One pair of the rank's own is computed last, while the last
    results travel.

    Args:
        problem: what to place.
        rows: a; default :func:`mesh_rows`.
    """
    layout, size = problem.layout, problem.layout.cp_size
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


def place_usp(problem: Problem) -> Placement:
    """Between the groups that exchange heads: lightseq on contiguous shards, the ring on all others."""
    return (place_lightseq if problem.layout.name in LIGHTSEQ_LAYOUTS else place_ring)(problem)
