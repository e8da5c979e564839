"""Which rank holds which tokens.

A *layout* cuts a sequence of N tokens into chunks and gives every chunk to one of P context-parallel
ranks. It is the only owner of the map token -> rank: batch slicing, rotary embedding, schedules and masks
all ask it, so that data and attention cannot disagree by each doing the arithmetic themselves.

    contiguous   rank r holds tokens [r N/P, (r+1) N/P)             (DistFlashAttn, arXiv 2310.03294, 3.1)
    zigzag       2P pieces; rank r holds pieces r and 2P-1-r        (Megatron's and Transformer Engine's CP)
    striped      rank r holds tokens r, r+P, r+2P, ...              (Striped Attention, arXiv 2311.09431)

A chunk's positions are a Python ``range``, whatever the layout; ``split(n)`` cuts every chunk into n adjacent
ones, which changes what a schedule can address and not which rank holds which token.

Standard library only: tensors are handled through their own methods.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_lightseq.errors import LayoutError, explain

LAYOUT_NAMES = ("contiguous", "zigzag", "striped")
_TEXT_FORM = re.compile(r"(?P<name>[a-z]+)\((?P<cp_size>\d+)\)(?:/(?P<splits>\d+))?")


@dataclass(frozen=True, slots=True)
class SequenceLayout:
    """How a sequence is cut over the ranks of a context-parallel group.

    Build one with :meth:`contiguous`, :meth:`zigzag` or :meth:`striped`. ``str()`` gives a short text form,
    :meth:`parse` reads it back.
    """

    name: str
    """``contiguous``, ``zigzag`` or ``striped``."""
    cp_size: int
    """P, the number of context-parallel ranks."""
    splits: int = 1
    """Adjacent chunks that every piece is divided into; 1 unless a schedule needs finer tiles."""

    def __post_init__(self) -> None:
        if self.name not in LAYOUT_NAMES:
            raise LayoutError(
                explain(
                    got=f"layout {self.name!r}",
                    rule=f"a layout is one of {', '.join(LAYOUT_NAMES)}",
                    remedy="Choose one of these names",
                )
            )
        if self.cp_size < 1 or self.splits < 1:
            raise LayoutError(
                explain(
                    got=f"layout {self.name} with cp_size={self.cp_size}, splits={self.splits}",
                    rule="both must be at least 1",
                    remedy="Give the size of the context-parallel group",
                )
            )

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
        """Rank r holds every P-th token, starting at r."""
        return SequenceLayout("striped", cp_size)

    def split(self, splits: int) -> SequenceLayout:
        """The same tokens on the same ranks, every piece addressed as ``splits`` adjacent chunks."""
        return replace(self, splits=splits)

    # --- groups of ranks ----------------------------------------------------------------------------------

    def merged(self, size: int) -> SequenceLayout:
        """The layout of P / ``size`` groups, each holding all that its ``size`` ranks held.

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
        """The ranks of a group of :meth:`merged`: adjacent ones, for stripes every (P / ``size``)-th."""
        if self.name == "striped":
            return tuple(range(group, self.cp_size, self.cp_size // size))
        return tuple(range(group * size, (group + 1) * size))

    def landing(self, member: int, size: int, shard_length: int) -> list[tuple[slice, slice]]:
        """Where the shard of a group's ``member``-th rank lies in the group's: pairs of (there, here) slices."""
        if self.name == "striped":
            return [(slice(0, shard_length), slice(member, shard_length * size, size))]
        if self.name == "contiguous":
            return [(slice(0, shard_length), slice(member * shard_length, (member + 1) * shard_length))]
        half = shard_length // 2  # late pieces follow each other in the opposite order
        late = shard_length * size - (member + 1) * half
        return [
            (slice(0, half), slice(member * half, (member + 1) * half)),
            (slice(half, shard_length), slice(late, late + half)),
        ]

    def __str__(self) -> str:
        return f"{self.name}({self.cp_size})" + (f"/{self.splits}" if self.splits > 1 else "")

    @staticmethod
    def parse(text: str) -> SequenceLayout:
        """Read the form that ``str()`` writes: ``contiguous(4)``, ``zigzag(2)``, ``contiguous(4)/2``.

        Raises:
            LayoutError: the text is not of that form.
        """
        match = _TEXT_FORM.fullmatch(text.strip())
        if match is None:
            raise LayoutError(
                explain(
                    got=f"layout text {text!r}",
                    rule="the form is NAME(RANKS) or NAME(RANKS)/SPLITS",
                    remedy="Write, for example, contiguous(4)",
                )
            )
        return SequenceLayout(match["name"], int(match["cp_size"]), int(match["splits"] or 1))

    # --- chunks -----------------------------------------------------------------------------------------

    @property
    def _num_pieces(self) -> int:
        return 2 * self.cp_size if self.name == "zigzag" else self.cp_size

    @property
    def num_chunks(self) -> int:
        """Chunks in the whole sequence, numbered in the order of their first token."""
        return self._num_pieces * self.splits

    @property
    def owner(self) -> tuple[int, ...]:
        """``owner[c]`` is the rank that holds chunk c."""
        return tuple(self._piece_owner(chunk // self.splits) for chunk in range(self.num_chunks))

    def _piece_owner(self, piece: int) -> int:
        return min(piece, 2 * self.cp_size - 1 - piece) if self.name == "zigzag" else piece

    def chunks_of(self, rank: int) -> tuple[int, ...]:
        """The chunks of a rank in the order in which its shard stores them."""
        pieces = (rank, 2 * self.cp_size - 1 - rank) if self.name == "zigzag" else (rank,)
        return tuple(piece * self.splits + part for piece in pieces for part in range(self.splits))

    def chunk_positions(self, chunk: int, seq_length: int) -> range:
        """Global positions of a chunk's tokens, in a sequence of ``seq_length`` tokens."""
        piece, part = divmod(chunk, self.splits)
        if self.name == "striped":
            positions = range(piece, seq_length, self.cp_size)
        else:
            length = seq_length // self._num_pieces
            positions = range(piece * length, (piece + 1) * length)
        return positions[part * len(positions) // self.splits : (part + 1) * len(positions) // self.splits]

    def positions(self, rank: int, seq_length: int) -> list[int]:
        """Global positions of the tokens of a rank's shard, in storage order.

        Raises:
            LayoutError: ``seq_length`` does not divide among the ranks.
        """
        self.check_length(seq_length)
        return [p for chunk in self.chunks_of(rank) for p in self.chunk_positions(chunk, seq_length)]

    def check_length(self, seq_length: int) -> None:
        """Raise :class:`LayoutError` unless all shards of ``seq_length`` tokens are equally long."""
        if seq_length < self._num_pieces or seq_length % self._num_pieces:
            factor = "2 x cp_size" if self.name == "zigzag" else "cp_size"
            below = max(1, seq_length // self._num_pieces) * self._num_pieces
            raise LayoutError(
                explain(
                    got=f"seq_length {seq_length} over cp_size {self.cp_size}",
                    rule=f"the {self.name} layout needs a multiple of {factor} = {self._num_pieces}",
                    remedy=f"Pad or cut the sequence, for example to {below} tokens",
                )
            )

    # --- tensors ----------------------------------------------------------------------------------------

    def shard(self, x: Any, rank: int, dim: int) -> Any:
        """The part of ``x`` that ``rank`` holds.

        Args:
            x: a tensor whose dimension ``dim`` is the whole sequence (any other shape).
            rank: context-parallel rank.
            dim: the sequence dimension; may be negative.

        Returns:
            The shard, ``1/cp_size`` as long in ``dim``; a view where the layout allows one.

        Raises:
            LayoutError: the sequence does not divide among the ranks.
        """
        dim %= len(x.shape)
        before, length, after = x.shape[:dim], x.shape[dim], x.shape[dim + 1 :]
        self.check_length(length)
        pieces = x.reshape(*before, *self._grid(length), *after)
        return pieces[(slice(None),) * dim + self._index(rank)].reshape(
            *before, length // self.cp_size, *after
        )

    def unshard(self, parts: Sequence[Any], dim: int) -> Any:
        """The inverse of :meth:`shard`: the whole tensor from all ranks' parts, in rank order.

        Raises:
            LayoutError: there is not one part a rank.
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
        dim %= len(shape)
        length = shape[dim] * self.cp_size
        whole = parts[0].new_empty((*shape[:dim], *self._grid(length), *shape[dim + 1 :]))
        for rank, part in enumerate(parts):
            index = (slice(None),) * dim + self._index(rank)
            whole[index] = part.reshape(whole[index].shape)
        return whole.reshape(*shape[:dim], length, *shape[dim + 1 :])

    def _grid(self, length: int) -> tuple[int, int]:
        """The two dimensions in which the pieces of a sequence lie along one of them."""
        if self.name == "striped":
            return length // self.cp_size, self.cp_size
        return self._num_pieces, length // self._num_pieces

    def _index(self, rank: int) -> tuple[Any, ...]:
        """Indices into the dimensions of :meth:`_grid` that select a rank's tokens."""
        if self.name == "zigzag":
            return ([rank, self._num_pieces - 1 - rank],)
        return (slice(None), rank) if self.name == "striped" else (rank,)
