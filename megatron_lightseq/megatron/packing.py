"""Packed micro-batches on the host: the documents of all rows, joined into one sequence.

Megatron calls this format ``thd``: a micro-batch of B rows of S tokens is one sequence of B * S tokens, with borders
between documents. The borders between rows are borders too, so one mask says everything, and the work of all rows is
balanced together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from megatron_lightseq.errors import ConfigError, explain
from megatron_lightseq.mask import Mask


@dataclass(frozen=True, kw_only=True)
class Packing:
    """The documents of one sequence, each with the padding that follows it."""

    cu_seqlens: tuple[int, ...]
    """Borders ``(0, n_1, n_1 + n_2, ..., tokens)`` of the documents with their padding."""
    lengths: tuple[int, ...]
    """Tokens of each document without its padding."""

    @staticmethod
    def of_borders(cu_seqlens: Sequence[int]) -> Packing:
        """Documents without padding."""
        borders = tuple(cu_seqlens)
        return Packing(cu_seqlens=borders, lengths=tuple(end - first for first, end in pairwise(borders)))

    @staticmethod
    def of_tokens(tokens: Tensor, eod: int) -> Packing:
        """The documents of one row of tokens (S,), each of which ends with the token ``eod``, but maybe the last."""
        ends = (tokens == eod).nonzero().flatten().add(1).tolist()
        return Packing.of_borders(tuple(dict.fromkeys((0, *ends, len(tokens)))))

    @staticmethod
    def of_documents(lengths: Sequence[int], tokens: int) -> Packing:
        """Documents one after another in a row of ``tokens`` tokens, the rest of which is padding.

        Raises:
            ConfigError: the documents are longer than the row.
        """
        borders = tuple(accumulate(lengths, initial=0))
        if borders[-1] > tokens:
            raise ConfigError(
                explain(
                    got=f"documents of {borders[-1]} tokens in all, in a row of {tokens}",
                    rule="documents are packed without cutting them",
                    remedy="Pack them into longer rows, or put fewer documents into one",
                )
            )
        if borders[-1] == tokens:
            return Packing(cu_seqlens=borders, lengths=tuple(lengths))
        return Packing(cu_seqlens=(*borders, tokens), lengths=(*lengths, 0))

    @staticmethod
    def joined(rows: Sequence[Packing]) -> Packing:
        """The documents of several rows, one row after the other."""
        starts = accumulate((row.tokens for row in rows), initial=0)
        borders = [
            first + border for first, row in zip(starts, rows, strict=False) for border in row.cu_seqlens[1:]
        ]
        return Packing(
            cu_seqlens=(0, *borders), lengths=tuple(length for row in rows for length in row.lengths)
        )

    @property
    def tokens(self) -> int:
        """Tokens of the sequence, padding included."""
        return self.cu_seqlens[-1]

    @property
    def longest(self) -> int:
        """Tokens of the longest document, with its padding."""
        return max((end - first for first, end in pairwise(self.cu_seqlens)), default=0)

    @cached_property
    def mask(self) -> Mask:
        """Which tokens belong to one document; padding sees nothing and is not seen.

        Raises:
            ConfigError: the borders do not start at 0, or decrease; or a length does not fit its document.
        """
        return Mask.padded(self.cu_seqlens, self.lengths, causal=False)

    def check_tokens(self, tokens: int) -> None:
        """Raise :class:`ConfigError` unless the borders are those of a sequence of ``tokens`` tokens."""
        self.mask  # noqa: B018 - checks that borders do not decrease, and that lengths fit
        if self.tokens != tokens:
            raise ConfigError(
                explain(
                    got=f"document borders that end at {self.tokens}, for {tokens} tokens",
                    rule="borders are those of the whole micro-batch, over all context-parallel ranks, and end with it",
                    remedy="Give the borders of this very micro-batch; count padding at its end as part of the last "
                    "document in cu_seqlens_q_padded, or as a document of its own",
                )
            )

    def positions(self, at: Tensor | None = None) -> Tensor:
        """(N,) int64: the positions of tokens within their documents.

        Args:
            at: (N,) int64, the places of the tokens in the sequence; None: all of them.
        """
        at = torch.arange(self.tokens) if at is None else at
        borders = torch.tensor(self.cu_seqlens)
        return at - borders[torch.searchsorted(borders, at, right=True) - 1]

    def lasts(self, at: Tensor | None = None) -> Tensor:
        """(N,) bool: true where the document does not go on with the next token, and for padding.

        Args:
            at: (N,) int64, the places of the tokens in the sequence; None: all of them.
        """
        at = torch.arange(self.tokens) if at is None else at
        borders = torch.tensor(self.cu_seqlens)
        ends = borders[:-1] + torch.tensor(self.lengths)
        return at >= ends[torch.searchsorted(borders, at, right=True) - 1] - 1
