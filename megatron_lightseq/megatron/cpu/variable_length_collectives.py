"""Gather and reduce-scatter with a different length per rank, which gloo lacks.

Experts that are split over tensor-parallel ranks gather and scatter as many tokens as each rank has received
(tensor_parallel/mappings.py). Parts of equal length still use Megatron's functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

Collective = Callable[..., torch.Tensor]


def gather_variable(gather_equal: Collective) -> Collective:
    """Megatron's ``_gather_along_first_dim``, extended to parts of unequal length."""

    def gather(
        input_: torch.Tensor,
        group: Any,
        output_split_sizes: list[int] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather_equal(input_, group, output_split_sizes, *args, **kwargs)
        sizes = [int(size) for size in output_split_sizes]
        padded = input_.new_zeros((max(sizes), *input_.shape[1:]))
        padded[: len(input_)] = input_
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    return gather


def reduce_scatter_variable(reduce_scatter_equal: Collective) -> Collective:
    """Megatron's ``_reduce_scatter_along_first_dim``, extended to parts of unequal length."""

    def reduce_scatter(
        input_: torch.Tensor,
        group: Any,
        input_split_sizes: list[int] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter_equal(input_, group, input_split_sizes, *args, **kwargs)
        total = input_.contiguous().clone()
        dist.all_reduce(total, group=group)
        sizes = [int(size) for size in input_split_sizes]
        return total.split(sizes)[group.rank()].clone()

    return reduce_scatter
