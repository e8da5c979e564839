"""Which tokens see each other, for layers that look back over a whole document: read from masks."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from megatron_lightseq.attention.inputs import Masks
from megatron_lightseq.attention.planner import shortened
from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.kernels.linear.contract import Documents
from megatron_lightseq.mask import Mask
from megatron_lightseq.mask.recognise import padding_of


@dataclass(frozen=True, slots=True)
class Packing:
    """The documents of one row, in order; together they are the whole row."""

    borders: tuple[int, ...]
    """``(0, n_1, n_1 + n_2, ..., seq_length)``."""
    lengths: tuple[int, ...]
    """Tokens of each document without the padding at its end."""

    @staticmethod
    def of(mask: Mask, seq_length: int) -> Packing:
        """The documents of a mask.

        Raises:
            ConfigError: the mask is for sequences of another length.
            UnsupportedError: it is neither causal nor made of causal documents.
        """
        mask.check_length(seq_length)
        packing = mask.packing(seq_length)
        if packing is not None:
            borders, (left, right) = tuple(dict.fromkeys(packing[0])), packing[1]
            lengths = tuple(end - first for first, end in pairwise(borders))
            longest = max(lengths)
            if longest == 1 or (right == 0 and (left is None or left >= longest - 1)):
                return Packing(borders, lengths)
        padded = None if mask.length is None else padding_of(mask.terms, mask.length)
        if padded is not None and padded[2]:
            return Packing(padded[0], padded[1])
        raise UnsupportedError(
            explain(
                got=f"mask {shortened(str(mask))}",
                rule="a state holds all earlier tokens of a document, so linear attention and causal convolutions take "
                "causal masks and causal documents, padded or not",
                remedy="Give Mask.causal(), Mask.documents(cu_seqlens) or Mask.padded(cu_seqlens, lengths), or use "
                "dist_attention for this mask",
            )
        )

    @property
    def is_plain(self) -> bool:
        """Whether it is one document without padding."""
        return len(self.borders) == 2 and self.lengths[0] == self.borders[1]

    def document(self, position: int) -> int:
        """The document that holds a position; -1 for padding, and before the sequence."""
        if position < 0:
            return -1
        index = bisect_right(self.borders, position) - 1
        return index if position < self.borders[index] + self.lengths[index] else -1

    def start(self, position: int) -> int:
        """Where the document of a position begins; the position itself for padding."""
        index = self.document(position)
        return position if index < 0 else self.borders[index]

    def stop(self, position: int) -> int:
        """One past the last token of the document of a position; behind it for padding."""
        index = self.document(position)
        return position + 1 if index < 0 else self.borders[index] + self.lengths[index]

    def ids(self, positions: range, device: torch.device) -> torch.Tensor:
        """:meth:`document` of adjacent positions, int64."""
        at = torch.arange(positions.start, positions.stop)
        borders = torch.tensor(self.borders[1:])
        index = torch.bucketize(at, borders, right=True).clamp(max=len(self.lengths) - 1)
        ends = torch.tensor([b + n for b, n in zip(self.borders, self.lengths, strict=False)])
        return torch.where((at >= 0) & (at < ends[index]), index, -1).to(device)


def packings_of(masks: Masks, seq_length: int) -> tuple[Packing, ...]:
    """The documents of each row, or of all rows if they are alike.

    Raises:
        ConfigError, UnsupportedError: as for :meth:`Packing.of`.
    """
    rows = (masks,) if isinstance(masks, Mask) else masks
    return tuple(Packing.of(mask, seq_length) for mask in rows)


def common_documents(packings: Sequence[Packing]) -> Mask:
    """Documents that begin in every row: a state crosses every other border in one row at least."""
    borders = set(packings[0].borders).intersection(*(packing.borders for packing in packings[1:]))
    return Mask.causal() if len(borders) == 2 else Mask.documents(sorted(borders))


def documents_of(packings: Sequence[Packing], positions: range, device: torch.device) -> Documents | None:
    """The documents of a shard's tokens; None if every row is one document."""
    if all(packing.is_plain for packing in packings):
        return None
    before = range(positions.start - 1, positions.stop)
    ids = torch.stack([packing.ids(before, device) for packing in packings])
    return Documents(ids[:, 1:], ids[:, 0])
