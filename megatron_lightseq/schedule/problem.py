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
        ConfigError: at construction, if the mask is for sequences of another length.
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

    chunk: int | None = None
    """Cut only at multiples of so many tokens of the sequence; None: wherever the method likes."""

    def __post_init__(self) -> None:
        self.layout.check_length(self.seq_length)
        self.mask.check_length(self.seq_length)

    @property
    def work(self) -> Mapping[Tile, int]:
        """Every tile of one chunk by one chunk that holds work, with its area: the number of (query, key) pairs
        that the mask allows in it. Computed when it is first read, once for both directions; read-only.
        """
        return work_of(self.layout, self.mask, self.seq_length)

    @property
    def areas(self) -> TileAreas:
        """The areas of tiles of any size, computed on demand; shared by both directions."""
        return areas_of(self.layout, self.mask, self.seq_length)


class TileAreas:
    """The areas of tiles: the numbers of (query, key) pairs that the mask allows in them. Computed on demand and
    kept."""

    def __init__(self, layout: SequenceLayout, mask: Mask, seq_length: int) -> None:
        self._layout = layout
        self._mask = mask
        self._seq_length = seq_length
        self._is_window = mask.window_size is not None
        self._known: dict[tuple[int, int, int, int], int] = {}
        self._of_tile: dict[Tile, int] = {}
        self._positions: dict[tuple[int, int], range] = {}

    def __call__(self, tile: Tile) -> int:
        """The area of a tile."""
        area = self._of_tile.get(tile)
        if area is None:
            q, k, queries, keys = tile
            area = self._of_tile[tile] = self.between(self.positions(q, queries), self.positions(k, keys))
        return area

    def positions(self, chunk: int, chunks: int = 1) -> range:
        """Global positions of the tokens of a chunk, or of several adjacent ones of one piece."""
        found = self._positions.get((chunk, chunks))
        if found is None:
            found = self._layout.chunk_positions(chunk, self._seq_length, chunks)
            self._positions[chunk, chunks] = found
        return found

    def between(self, queries: range, keys: range) -> int:
        """The area of queries against keys at these global positions, which have the same stride."""
        # In a window an area depends only on the lengths and on the distance from the queries to the keys.
        at = 0 if self._is_window else queries.start
        like = (at, keys.start - queries.start, len(queries), len(keys))
        area = self._known.get(like)
        if area is None:
            area = self._known[like] = self._mask.area(queries, keys)
        return area

    @property
    def total(self) -> int:
        """The area of the whole sequence."""
        return self.between(range(self._seq_length), range(self._seq_length))


@lru_cache(maxsize=8)
def areas_of(layout: SequenceLayout, mask: Mask, seq_length: int) -> TileAreas:
    """The areas of tiles of ``seq_length`` tokens cut by ``layout`` under ``mask``; shared by both directions."""
    return TileAreas(layout, mask, seq_length)


@lru_cache(maxsize=8)
def work_of(layout: SequenceLayout, mask: Mask, seq_length: int) -> Mapping[Tile, int]:
    """All tiles of one chunk by one chunk that hold work, with their areas; read-only."""
    areas = areas_of(layout, mask, seq_length)
    chunks = range(layout.num_chunks)
    found = {tile: areas(tile) for q in chunks for k in chunks if areas(tile := Tile(q, k))}
    return MappingProxyType(found)
