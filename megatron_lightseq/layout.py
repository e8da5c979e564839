"""Which rank holds which tokens.

A *layout* cuts a sequence of N tokens into pieces and gives each piece to one of P context-parallel ranks. It is the
only owner of the map from tokens to ranks: batches, rotary embeddings, schedules and masks all ask it, so data and
attention cannot disagree because each did its own arithmetic.

    contiguous   rank r holds tokens [r N/P, (r+1) N/P)             (DistFlashAttn, arXiv 2310.03294, 3.1)
    zigzag       2P pieces; rank r holds pieces r and 2P-1-r        (Megatron's and Transformer Engine's CP)
    striped      rank r holds tokens r, r+P, r+2P, ...              (Striped Attention, arXiv 2311.09431)
    dealt        P pieces, dealt to nodes of 8 ranks in turn        (derived here; up to 8 ranks it is contiguous)

``LAYOUTS`` says which pieces each rank holds, and everything else here follows from it: a new layout is one entry.
A schedule addresses *chunks*: every piece divided into ``splits`` parts. A chunk's positions are a Python ``range``
in every layout.

Where the rows of a batch have masks of their own, a schedule sees them as one sequence, row after row
(:meth:`SequenceLayout.of_rows`): every row is cut as above, and a rank holds its pieces of all of them.

Standard library only: tensors are handled through their own methods.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from megatron_lightseq.errors import LayoutError, explain


@dataclass(frozen=True, slots=True)
class LayoutRule:
    """How a layout cuts a sequence: into how many pieces, and which of them each rank holds."""

    pieces_of: Callable[[int, int], tuple[int, ...]]
    """From (rank, P) to the rank's pieces, in the order in which its shard stores them. All ranks hold equally many,
    and each piece belongs to one rank."""
    interleaved: bool = False
    """Whether piece i of M is every M-th token starting at token i, instead of the i-th of M equal stretches."""

    @lru_cache(maxsize=256)  # noqa: B019 - a rule is an entry of a table and lives as long as the table
    def pieces(self, cp_size: int) -> tuple[tuple[int, ...], ...]:
        """The pieces of every rank, checked.

        Raises:
            LayoutError: a piece is missing or held twice, or ranks hold different numbers of pieces.
        """
        held = tuple(tuple(self.pieces_of(rank, cp_size)) for rank in range(cp_size))
        if sorted(sum(held, ())) != list(range(cp_size * len(held[0]))) or len(set(map(len, held))) > 1:
            raise LayoutError(
                explain(
                    got=f"pieces {held} of {cp_size} ranks",
                    rule="every rank holds equally many pieces, and every piece is held by one rank",
                    remedy="Correct the layout's entry in LAYOUTS",
                )
            )
        return held


DEALT_RANKS_PER_NODE = 8
"""Consecutive ranks of a node, to the ``dealt`` layout."""


def _dealt(rank: int, cp_size: int) -> tuple[int, ...]:
    """Piece p is on node p mod n of n, so that a long document is on all nodes, and each can balance its own part."""
    nodes, rest = divmod(cp_size, DEALT_RANKS_PER_NODE)
    if rest or nodes < 2:
        return (rank,)
    node, index = divmod(rank, DEALT_RANKS_PER_NODE)
    return (index * nodes + node,)


LAYOUTS: dict[str, LayoutRule] = {
    "contiguous": LayoutRule(lambda rank, cp_size: (rank,)),
    "zigzag": LayoutRule(lambda rank, cp_size: (rank, 2 * cp_size - 1 - rank)),
    "striped": LayoutRule(lambda rank, cp_size: (rank,), interleaved=True),
    "dealt": LayoutRule(_dealt),
}
"""Every layout by name."""

_TEXT_FORM = re.compile(
    r"(?:(?P<batch_rows>\d+)\*)?(?P<name>[a-z]\w*)\((?P<cp_size>\d+)\)(?:/(?P<splits>\d+))?"
)


@dataclass(frozen=True, slots=True)
class SequenceLayout:
    """How a sequence is cut over the ranks of a context-parallel group.

    Build one by name, or with :meth:`contiguous`, :meth:`zigzag` or :meth:`striped`. ``str()`` gives a short text
    form that :meth:`parse` reads back.

    Raises:
        LayoutError: an unknown name, a size below 1, or an entry of ``LAYOUTS`` whose pieces make up no sequence.
    """

    name: str
    """A name in ``LAYOUTS``."""
    cp_size: int
    """P, the number of context-parallel ranks."""
    splits: int = 1
    """Adjacent chunks that every piece is divided into; 1 unless a schedule needs finer tiles."""
    batch_rows: int = 1
    """Sequences of equal length that follow one another in what is cut; each is cut alike."""

    def __post_init__(self) -> None:
        if self.name not in LAYOUTS:
            raise LayoutError(
                explain(
                    got=f"layout {self.name!r}",
                    rule=f"a layout is one of {', '.join(LAYOUTS)}",
                    remedy="Choose one of these names",
                )
            )
        if self.cp_size < 1 or self.splits < 1 or self.batch_rows < 1:
            raise LayoutError(
                explain(
                    got=f"layout {self.name} with cp_size={self.cp_size}, splits={self.splits}, "
                    f"batch_rows={self.batch_rows}",
                    rule="all must be at least 1",
                    remedy="Give the size of the context-parallel group",
                )
            )
        LAYOUTS[self.name].pieces(self.cp_size)  # raises if they do not make up a sequence

    @staticmethod
    def contiguous(cp_size: int) -> SequenceLayout:
        """Rank r holds the r-th of P equal pieces."""
        return SequenceLayout("contiguous", cp_size)

    @staticmethod
    def zigzag(cp_size: int) -> SequenceLayout:
        """Rank r holds pieces r and 2P-1-r of 2P: one early, one late, so causal work is equal."""
        return SequenceLayout("zigzag", cp_size)

    @staticmethod
    def striped(cp_size: int) -> SequenceLayout:
        """Rank r holds every P-th token, starting at token r."""
        return SequenceLayout("striped", cp_size)

    def split(self, splits: int) -> SequenceLayout:
        """The same tokens on the same ranks, with every piece addressed as ``splits`` adjacent chunks."""
        return replace(self, splits=splits)

    def of_rows(self, batch_rows: int) -> SequenceLayout:
        """The layout of ``batch_rows`` sequences, one after the other, each cut by this one.

        A rank's shard is then its shards of all rows, in order. Tensors keep rows apart in their batch dimension, so
        they are cut by the layout of one row.
        """
        return replace(self, batch_rows=batch_rows)

    def __str__(self) -> str:
        rows = f"{self.batch_rows}*" if self.batch_rows > 1 else ""
        return f"{rows}{self.name}({self.cp_size})" + (f"/{self.splits}" if self.splits > 1 else "")

    @staticmethod
    def parse(text: str) -> SequenceLayout:
        """Read the form that ``str()`` writes: ``contiguous(4)``, ``contiguous(4)/2``, ``3*zigzag(2)`` for three rows.

        Raises:
            LayoutError: the text does not have that form.
        """
        match = _TEXT_FORM.fullmatch(text.strip())
        if match is None:
            raise LayoutError(
                explain(
                    got=f"layout text {text!r}",
                    rule="the form is NAME(RANKS) or NAME(RANKS)/SPLITS, with ROWS* before it for several rows",
                    remedy="Write, for example, contiguous(4)",
                )
            )
        return SequenceLayout(
            match["name"], int(match["cp_size"]), int(match["splits"] or 1), int(match["batch_rows"] or 1)
        )

    # --- pieces and chunks ----------------------------------------------------------------------------------

    @property
    def _pieces(self) -> tuple[tuple[int, ...], ...]:
        """The pieces of every rank, in storage order."""
        of_one_row = LAYOUTS[self.name].pieces(self.cp_size)
        return of_one_row if self.batch_rows == 1 else _pieces_of_rows(of_one_row, self.batch_rows)

    @property
    def _interleaved(self) -> bool:
        return LAYOUTS[self.name].interleaved

    @property
    def pieces_per_row(self) -> int:
        """Pieces of all ranks in one row; all there are, if there is one row."""
        return self.cp_size * len(LAYOUTS[self.name].pieces(self.cp_size)[0])

    @property
    def _num_pieces(self) -> int:
        return self.batch_rows * self.pieces_per_row

    @property
    def num_chunks(self) -> int:
        """Chunks in the whole sequence; a piece's chunks are numbered one after the other."""
        return self._num_pieces * self.splits

    @property
    def owner(self) -> tuple[int, ...]:
        """``owner[c]`` is the rank that holds chunk c."""
        return _owners(self)

    def chunks_of(self, rank: int) -> tuple[int, ...]:
        """The chunks of a rank in the order in which its shard stores them.

        Raises:
            LayoutError: there is no such rank.
        """
        pieces = self._pieces_of(rank)
        return tuple(piece * self.splits + part for piece in pieces for part in range(self.splits))

    def _pieces_of(self, rank: int) -> tuple[int, ...]:
        if not 0 <= rank < self.cp_size:
            raise LayoutError(
                explain(
                    got=f"rank {rank}",
                    rule=f"{self} has the context-parallel ranks 0 to {self.cp_size - 1}",
                    remedy="Give this process's rank in the context-parallel group, or another cp_size",
                )
            )
        return self._pieces[rank]

    def row_of(self, chunk: int) -> int:
        """The row that holds chunk ``chunk``."""
        return chunk // (self.splits * self.pieces_per_row)

    def chunk_positions(self, chunk: int, seq_length: int, chunks: int = 1) -> range:
        """Global positions of the tokens of a chunk, or of several adjacent chunks of one piece."""
        piece, part = divmod(chunk, self.splits)
        if self._interleaved:
            row, at = divmod(piece, self.pieces_per_row)
            row_length = seq_length // self.batch_rows
            positions = range(row * row_length + at, (row + 1) * row_length, self.pieces_per_row)
        else:
            length = seq_length // self._num_pieces
            positions = range(piece * length, (piece + 1) * length)
        return positions[
            part * len(positions) // self.splits : (part + chunks) * len(positions) // self.splits
        ]

    def positions(self, rank: int, seq_length: int) -> list[int]:
        """Global positions of the tokens of a rank's shard, in storage order.

        Raises:
            LayoutError: the ranks cannot hold equal shards of ``seq_length`` tokens, or there is no such rank.
        """
        self.check_length(seq_length)
        return [p for chunk in self.chunks_of(rank) for p in self.chunk_positions(chunk, seq_length)]

    def divides(self, seq_length: int) -> bool:
        """Whether ``seq_length`` tokens can be cut into equal pieces, each of one token or more."""
        return seq_length >= self._num_pieces and seq_length % self._num_pieces == 0

    def check_length(self, seq_length: int) -> None:
        """Raise :class:`LayoutError` unless :meth:`divides`."""
        if not self.divides(seq_length):
            per_rank = len(self._pieces[0])
            below = max(1, seq_length // self._num_pieces) * self._num_pieces
            raise LayoutError(
                explain(
                    got=f"seq_length {seq_length} over cp_size {self.cp_size}",
                    rule=f"the {self.name} layout needs a multiple of "
                    f"{f'{per_rank} x ' if per_rank > 1 else ''}cp_size = {self._num_pieces}",
                    remedy=f"Pad or cut the sequence, for example to {below} tokens",
                )
            )

    # --- groups of ranks ------------------------------------------------------------------------------------

    def merged(self, size: int) -> SequenceLayout:
        """The layout of P / ``size`` groups, each holding everything that its ``size`` ranks held, in every row.

        Raises:
            LayoutError: ``size`` does not divide P.
        """
        if size < 1 or self.cp_size % size:
            raise LayoutError(
                explain(
                    got=f"groups of {size} among {self.cp_size} context-parallel ranks",
                    rule="the group size (cp_ulysses_size) divides the number of ranks",
                    remedy="Choose a divisor",
                )
            )
        return replace(self, cp_size=self.cp_size // size)

    def members(self, group: int, size: int) -> tuple[int, ...]:
        """The ranks of one group of :meth:`merged`, in ascending order.

        Raises:
            LayoutError: no ``size`` ranks hold exactly what the group holds.
        """
        merged = self.merged(size)
        of_group = set(merged._pieces[group])
        ranks = tuple(
            rank
            for rank, pieces in enumerate(self._pieces)
            if of_group.issuperset(merged._whole_piece(piece, size) for piece in pieces)
        )
        if len(ranks) != size:
            raise LayoutError(
                explain(
                    got=f"{len(ranks)} ranks of {self} inside group {group} of {merged}",
                    rule=f"each of the layout's groups is made of {size} whole ranks",
                    remedy="Choose a method that exchanges no heads, or another layout",
                )
            )
        return ranks

    def _whole_piece(self, part: int, size: int) -> int:
        """The piece of this layout that contains piece ``part`` of a layout with ``size`` times as many pieces."""
        return part % self._num_pieces if self._interleaved else part // size

    def landing(self, rank: int, size: int, shard_length: int) -> list[tuple[slice, slice]]:
        """Where the tokens of a rank's shard lie in the shard of its group of ``size`` ranks.

        Returns:
            For each piece of the rank, (slice of the rank's shard, slice of the group's shard).
        """
        merged, length = self.merged(size), shard_length // len(self._pieces[rank])
        stored_at = {
            piece: at * length * size for pieces in merged._pieces for at, piece in enumerate(pieces)
        }
        places = []
        for index, part in enumerate(self._pieces[rank]):
            whole = merged._whole_piece(part, size)
            begin = stored_at[whole]
            if self._interleaved:
                there = slice(begin + part // merged._num_pieces, begin + length * size, size)
            else:
                begin += (part - whole * size) * length
                there = slice(begin, begin + length)
            places.append((slice(index * length, (index + 1) * length), there))
        return places

    # --- tensors ----------------------------------------------------------------------------------------

    def shard(self, x: Any, rank: int, dim: int) -> Any:
        """The part of ``x`` that ``rank`` holds.

        Args:
            x: a tensor whose dimension ``dim`` is the whole sequence (any other shape).
            rank: context-parallel rank.
            dim: the sequence dimension; may be negative.

        Returns:
            The shard, ``1/cp_size`` as long in ``dim``; a view if the rank holds one piece.

        Raises:
            LayoutError: the sequence does not divide among the ranks, or there is no such rank or dimension.
        """
        dim = _checked_dim(x, dim)
        before, length, after = x.shape[:dim], x.shape[dim], x.shape[dim + 1 :]
        self.check_length(length)
        held = self._by_piece(x, dim)[self._at(rank, dim)]
        return held.reshape(*before, length // self.cp_size, *after)

    def unshard(self, parts: Sequence[Any], dim: int) -> Any:
        """The inverse of :meth:`shard`: the whole tensor from the parts of all ranks, in rank order.

        Raises:
            LayoutError: there is not one part per rank, they differ in shape, or there is no such dimension.
        """
        if len(parts) != self.cp_size:
            raise LayoutError(
                explain(
                    got=f"{len(parts)} parts",
                    rule=f"{self} has {self.cp_size} ranks",
                    remedy="Give the shard of every rank, in rank order",
                )
            )
        shape = tuple(parts[0].shape)
        if any(tuple(part.shape) != shape for part in parts):
            raise LayoutError(
                explain(
                    got=f"parts of shapes {', '.join(str(tuple(part.shape)) for part in parts)}",
                    rule="all ranks hold equally much of a sequence",
                    remedy="Give the shards of one tensor",
                )
            )
        dim = _checked_dim(parts[0], dim)
        whole = parts[0].new_empty((*shape[:dim], shape[dim] * self.cp_size, *shape[dim + 1 :]))
        by_piece = self._by_piece(whole, dim)
        for rank, part in enumerate(parts):
            at = self._at(rank, dim)
            by_piece[at] = part.reshape(by_piece[at].shape)
        return whole

    def _by_piece(self, x: Any, dim: int) -> Any:
        """A view of ``x`` whose sequence dimension is replaced by two: pieces, and the tokens of a piece."""
        assert self.batch_rows == 1, "rows are a dimension of tensors, and cut one by one"
        shape, length = x.shape, x.shape[dim] // self._num_pieces
        if self._interleaved:
            view = x.reshape(*shape[:dim], length, self._num_pieces, *shape[dim + 1 :])
            return view.swapaxes(dim, dim + 1)
        return x.reshape(*shape[:dim], self._num_pieces, length, *shape[dim + 1 :])

    def _at(self, rank: int, dim: int) -> tuple[Any, ...]:
        """The index of a rank's pieces in :meth:`_by_piece`."""
        pieces = self._pieces_of(rank)
        return (*(slice(None),) * dim, pieces[0] if len(pieces) == 1 else list(pieces))


def _checked_dim(x: Any, dim: int) -> int:
    """The number of a tensor's dimension, counted from the front."""
    dims = len(x.shape)
    if not -dims <= dim < dims:
        raise LayoutError(
            explain(
                got=f"dimension {dim} of a tensor of shape {tuple(x.shape)}",
                rule=f"it has the dimensions 0 to {dims - 1}, or -{dims} to -1" if dims else "it has none",
                remedy="Give the dimension that is the sequence",
            )
        )
    return dim % dims


@lru_cache(maxsize=64)
def _pieces_of_rows(of_one_row: tuple[tuple[int, ...], ...], batch_rows: int) -> tuple[tuple[int, ...], ...]:
    count = sum(map(len, of_one_row))
    return tuple(
        tuple(row * count + piece for row in range(batch_rows) for piece in pieces) for pieces in of_one_row
    )


@lru_cache(maxsize=64)
def _owners(layout: SequenceLayout) -> tuple[int, ...]:
    rank_of = {piece: rank for rank, pieces in enumerate(layout._pieces) for piece in pieces}
    return tuple(rank_of[piece] for piece in range(layout._num_pieces) for _ in range(layout.splits))
