"""What a placement is asked to place: one pass of attention over the ranks of a group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType

from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule.ir import Direction, Tile
from megatron_lightseq.schedule.network import Network
from megatron_lightseq.schedule.shape import TensorShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Everything that a placement may depend on; hashable, so that schedules can be kept by it.

    Raises:
        LayoutError: at construction, if the ranks cannot hold equal shards of ``seq_length`` tokens.
        ConfigError: at construction, if the mask's documents do not end at ``seq_length``.
    """

    layout: SequenceLayout
    """Which rank holds which chunk of the sequence."""
    mask: Mask
    """Which keys a query may see."""
    seq_length: int
    """Tokens in the whole sequence, over all ranks."""
    direction: Direction = Direction.FORWARD
    """Forward and backward may be placed differently: different tensors travel."""
    shape: TensorShape = field(default_factory=TensorShape)
    """The attention inputs: batch, heads, head dims, bytes per element. A placement sees the default here unless its
    method is marked :attr:`Method.uses_shape`."""
    network: Network | None = None
    """What transfers run over, if it is known; None, too, unless the method is marked :attr:`Method.uses_shape`."""

    def __post_init__(self) -> None:
        self.layout.check_length(self.seq_length)
        self.mask.check_length(self.seq_length)

    @property
    def work(self) -> Mapping[Tile, int]:
        """Every tile that holds work, with its area: how many (query, key) pairs the mask allows in it. Computed when
        it is first read, once for both directions; read-only.
        """
        return work_of(self.layout, self.mask, self.seq_length)


@lru_cache(maxsize=8)
def work_of(layout: SequenceLayout, mask: Mask, seq_length: int) -> Mapping[Tile, int]:
    """Tiles with work and their areas, for ``seq_length`` tokens cut by ``layout`` under ``mask``; read-only."""
    positions = [layout.chunk_positions(chunk, seq_length) for chunk in range(layout.num_chunks)]
    # Without documents a tile's area depends only on its lengths and on the distance from its queries to its keys.
    areas: dict[tuple[int, int, int], int] = {}
    work: dict[Tile, int] = {}
    for q, queries in enumerate(positions):
        q_start, q_length = queries.start, len(queries)
        for k, keys in enumerate(positions):
            like = (keys.start - q_start, q_length, len(keys))
            area = None if mask.cu_seqlens else areas.get(like)
            if area is None:
                area = areas[like] = mask.area(queries, keys)
            if area:
                work[Tile(q, k)] = area
    return MappingProxyType(work)
