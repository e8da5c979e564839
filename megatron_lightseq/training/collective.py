"""Small decisions that all ranks take together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


def largest(number: int, device: torch.device) -> int:
    """The largest of the ranks' numbers. Collective."""
    return all_largest([number], device)[0]


def all_largest(numbers: Sequence[int], device: torch.device) -> list[int]:
    """Position by position, the largest of the ranks' numbers, which are equally many. Collective, one reduction."""
    reduced = torch.tensor(numbers, dtype=torch.int64, device=device)
    dist.all_reduce(reduced, op=dist.ReduceOp.MAX)
    found: list[int] = reduced.tolist()
    return found
