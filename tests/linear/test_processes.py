from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

import megatron_lightseq as mls
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule import SCANS
from tests.harness.ranks import run_ranks
from tests.linear.cases import attended, inputs, one_rank

MASK = Mask.documents([0, 7, 250, 384])


def over_gloo() -> dict[str, list[Tensor]]:
    """This rank's output and gradients by scan, and those of a convolution."""
    tensors, dout = inputs("gdn", 384, dtype=torch.float32)
    group = dist.group.WORLD
    results = {scan: one_rank(group, tensors, dout, MASK, scan=scan) for scan in SCANS}
    x = SequenceLayout.contiguous(dist.get_world_size()).shard(dout[..., 0, :], dist.get_rank(), 0).clone()
    weight = torch.arange(16.0).view(4, 4)
    out = mls.dist_causal_conv1d(x.requires_grad_(), weight, group=group, mask=MASK)
    return results | {"conv": [out.detach(), *torch.autograd.grad(out, x, torch.ones_like(out))]}


def test_processes_give_the_bits_of_one() -> None:
    tensors, dout = inputs("gdn", 384, dtype=torch.float32)
    one = attended(1, tensors, dout, MASK)
    x = dout[..., 0, :].clone().requires_grad_()
    convolved = mls.dist_causal_conv1d(x, torch.arange(16.0).view(4, 4), mask=MASK)
    alone = [convolved.detach(), *torch.autograd.grad(convolved, x, torch.ones_like(convolved))]
    parts = run_ranks(3, over_gloo)
    layout = SequenceLayout.contiguous(3)
    for name in (*SCANS, "conv"):
        for shards, want in zip(
            zip(*(part[name] for part in parts), strict=True), alone if name == "conv" else one, strict=True
        ):
            assert torch.equal(layout.unshard(list(shards), 0), want), name
