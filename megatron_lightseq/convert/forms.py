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
class GatedByGroup:
    """As :class:`ByGroup`, where each query head of the file is followed by a head of its output gate.

    Megatron has for each group its query heads, as many heads of gates, its key head and its value head.
    """

    heads: int
    groups: int
    head_dim: int

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        queries, key, value = parts
        by_head = queries.unflatten(0, (self.groups, -1, 2, self.head_dim)).transpose(1, 2)
        others = [part.unflatten(0, (self.groups, 1, self.head_dim)) for part in (key, value)]
        return torch.cat([by_head.flatten(1, 2), *others], 1).flatten(0, 2)

    def split(self, whole: Tensor) -> list[Tensor]:
        per_group = self.heads // self.groups
        grouped = whole.unflatten(0, (self.groups, 2 * per_group + 2, self.head_dim))
        queries, key, value = grouped.split([2 * per_group, 1, 1], 1)
        by_head = queries.unflatten(1, (2, per_group)).transpose(1, 2)
        return [by_head.flatten(0, 3), key.flatten(0, 2), value.flatten(0, 2)]


@dataclass(frozen=True, slots=True)
class Sections:
    """Several tensors, one below the other."""

    rows: tuple[int, ...]
    """Of each."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts))

    def split(self, whole: Tensor) -> list[Tensor]:
        return list(whole.split(list(self.rows)))


@dataclass(frozen=True, slots=True)
class ByKeyHead:
    """Tensors that have for each key head a part of several sections; Megatron has section after section.

    ``rows`` has for each tensor of the file the rows of its sections that belong to one key head.
    """

    key_heads: int
    rows: tuple[tuple[int, ...], ...]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        by_head = [part.unflatten(0, (self.key_heads, -1)) for part in parts]
        return torch.cat(
            [
                section.flatten(0, 1)
                for part, rows in zip(by_head, self.rows, strict=True)
                for section in part.split(list(rows), 1)
            ]
        )

    def split(self, whole: Tensor) -> list[Tensor]:
        sections = iter(whole.split([self.key_heads * rows for part in self.rows for rows in part]))
        by_head = [
            [next(sections).unflatten(0, (self.key_heads, rows)) for rows in part] for part in self.rows
        ]
        return [torch.cat(part, 1).flatten(0, 1) for part in by_head]


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
