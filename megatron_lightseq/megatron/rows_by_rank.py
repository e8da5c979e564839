"""Matrices of several sections one below the other, each of which is cut over the tensor-parallel ranks.

Megatron cuts a matrix into equal ranges of rows. Where a rank is to hold a part of every section (of queries, keys,
values, ...), its range consists of these parts, so a whole matrix has its rows in another order for every number of
ranks. Initial values and checkpoints are therefore made section by section.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor

from megatron_lightseq.megatron.seeded_init import Init

SECTIONS = "sections"
"""The attribute of a parameter that holds the sizes of its rank's parts of the sections."""


def rows_of_rank(sizes: Mapping[str, int], rank: int, size: int) -> Tensor:
    """(rows / size,) int64: which rows of a matrix, in its own order, a rank holds.

    Args:
        sizes: rows of each section, in order; divisible by ``size``.
        rank: tensor-parallel rank.
        size: number of tensor-parallel ranks.
    """
    starts = accumulate(sizes.values(), initial=0)
    parts = [
        torch.arange(start + rank * rows // size, start + (rank + 1) * rows // size)
        for start, rows in zip(starts, sizes.values(), strict=False)
    ]
    return torch.cat(parts)


def by_rank(init: Init, sizes: Mapping[str, int], size: int) -> Init:
    """An initialiser of whole matrices whose equal ranges of rows are what ranks hold of the sections.

    A matrix with fewer rows is one rank's own, and is initialised as it is.
    """
    order = torch.cat([rows_of_rank(sizes, rank, size) for rank in range(size)])

    def draw(tensor: Tensor) -> Tensor:
        init(tensor)
        if size > 1 and len(tensor) == len(order):
            with torch.no_grad():
                tensor.copy_(tensor[order.to(tensor.device)])
        return tensor

    return draw


def split_rows(whole: ShardedTensor, sizes: Mapping[str, int], size: int) -> ShardedTensorFactory:
    """A rank's rows in a checkpoint: each section is a tensor of its own, which other numbers of ranks can load.

    Args:
        whole: the rank's rows, as Megatron shards them.
        sizes: rows of each section over all ranks, by the name that is appended to the tensor's key.
        size: number of tensor-parallel ranks.
    """
    described = whole.without_data()

    @torch.no_grad()
    def build(key: str, tensor: Tensor, replica_id: Any, flattened_range: slice | None) -> list[Any]:
        own = replace(
            described,
            key=key,
            data=tensor,
            dtype=tensor.dtype,
            replica_id=replica_id,
            flattened_range=flattened_range,
        )
        parts, start = [], 0
        for name, rows in sizes.items():
            for part in own.narrow(0, start, rows // size):
                part.key = f"{part.key}.{name}"
                parts.append(part)
            start += rows // size
        return parts

    @torch.no_grad()
    def merge(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts)

    return ShardedTensorFactory(whole.key, whole.data, build, merge, whole.replica_id)
