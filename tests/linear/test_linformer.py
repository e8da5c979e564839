from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from docs.examples.linformer import dist_linformer
from megatron_lightseq.layout import SequenceLayout
from tests.harness.ranks import run_ranks


def whole() -> list[Tensor]:
    """q, k, v, both projections and the gradient of the output, for 24 tokens and 5 rows."""
    source = torch.Generator().manual_seed(0)
    shapes = [(24, 2, 3, 4)] * 3 + [(24, 5)] * 2 + [(24, 2, 3, 4)]
    return [torch.randn(*shape, generator=source, dtype=torch.float64) for shape in shapes]


def one_rank(tensors: list[Tensor]) -> list[Tensor]:
    """This rank's output and gradients."""
    layout, rank = SequenceLayout.contiguous(dist.get_world_size()), dist.get_rank()
    *leaves, dout = (layout.shard(x, rank, 0).clone() for x in tensors)
    for leaf in leaves:
        leaf.requires_grad_()
    out = dist_linformer(*leaves, group=dist.group.WORLD)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def expected(tensors: list[Tensor]) -> list[Tensor]:
    """By a softmax over the projected keys."""
    q, k, v, to_keys, to_values = (x.clone().requires_grad_() for x in tensors[:5])
    keys, values = torch.einsum("sr,sbhd->rbhd", to_keys, k), torch.einsum("sr,sbhd->rbhd", to_values, v)
    weights = (torch.einsum("sbhd,rbhd->bhsr", q, keys) / 2).softmax(-1)
    out = torch.einsum("bhsr,rbhd->sbhd", weights, values)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v, to_keys, to_values), tensors[5])]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_number_of_ranks_equals_one(size: int) -> None:
    tensors = whole()
    layout = SequenceLayout.contiguous(size)
    parts = run_ranks(size, one_rank, tensors)
    for shards, want in zip(zip(*parts, strict=True), expected(tensors), strict=True):
        torch.testing.assert_close(layout.unshard(list(shards), 0), want, rtol=1e-12, atol=1e-12)
