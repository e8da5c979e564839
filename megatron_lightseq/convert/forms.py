"""How the tensors of one format make up a tensor of the other: rearrangements that lose nothing.

A form joins the tensors of a Hugging Face file into one of Megatron's and splits it again, bit for bit. Both formats
store a linear layer as (outputs, inputs); a bias has outputs only, and is rearranged in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Form(Protocol):
    """One rearrangement."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Megatron's tensor, from those of the file."""

    def split(self, whole: Tensor) -> list[Tensor]:
        """The tensors of the file, from Megatron's; also on the meta device, for their shapes."""


@dataclass(frozen=True, slots=True)
class Same:
    """One tensor, as it is."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        (only,) = parts
        return only

    def split(self, whole: Tensor) -> list[Tensor]:
        return [whole]


SAME = Same()


@dataclass(frozen=True, slots=True)
class Stacked:
    """Equal shares of rows, one below the other: a gated MLP's gate, then its up projection."""

    count: int = 2

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts))

    def split(self, whole: Tensor) -> list[Tensor]:
        return list(whole.chunk(self.count))


@dataclass(frozen=True, slots=True)
class ByGroup:
    """Queries, keys and values by key/value group: for each group its query heads, its key head and its value head.

    A tensor parallel rank can then take whole groups.
    """

    heads: int
    groups: int
    head_dim: int

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        grouped = [part.reshape(self.groups, -1, self.head_dim, *part.shape[1:]) for part in parts]
        return torch.cat(grouped, 1).flatten(0, 2)

    def split(self, whole: Tensor) -> list[Tensor]:
        per_group = self.heads // self.groups
        grouped = whole.reshape(self.groups, per_group + 2, self.head_dim, *whole.shape[1:])
        return [part.flatten(0, 2) for part in grouped.split([per_group, 1, 1], 1)]


@dataclass(frozen=True, slots=True)
class Fused:
    """What ``inner`` has as several tensors lies in the file as one, one below the other."""

    inner: Form
    rows: tuple[int, ...]
    """Rows of each."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        (only,) = parts
        return self.inner.join(only.split(list(self.rows)))

    def split(self, whole: Tensor) -> list[Tensor]:
        return [torch.cat(self.inner.split(whole))]


@dataclass(frozen=True, slots=True)
class Transposed:
    """(inputs, outputs) in the file."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        (only,) = parts
        return only.t()

    def split(self, whole: Tensor) -> list[Tensor]:
        return [whole.t()]


@dataclass(frozen=True, slots=True)
class Alternating:
    """Gate and up projection in alternating columns of (inputs, outputs), or alternating elements of a bias."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        (only,) = parts
        return torch.cat([only[..., 0::2].t(), only[..., 1::2].t()]) if only.dim() > 1 else _halves(only)

    def split(self, whole: Tensor) -> list[Tensor]:
        gate, up = whole.chunk(2)
        return [torch.stack([gate, up], -1).flatten(-2) if whole.dim() == 1 else _alternate(gate, up)]


def _halves(bias: Tensor) -> Tensor:
    return torch.cat([bias[0::2], bias[1::2]])


def _alternate(gate: Tensor, up: Tensor) -> Tensor:
    return torch.stack([gate.t(), up.t()], -1).flatten(-2)
