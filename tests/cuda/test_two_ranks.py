"""Two ranks of dist_attention, over gloo, on one GPU: always on the emulated one, and on a real one if available."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_lightseq.attention import DistAttention
from megatron_lightseq.kernels.cuda import CudaKernel
from megatron_lightseq.kernels.registry import Kernel
from tests.cuda.emulator import Emulator, cached_library, missing
from tests.cuda.staged import StagedKernel
from tests.harness.ranks import run_ranks
from tests.kernels.oracle import Case, Results, expect_within_budget, inputs

CASE = Case(queries=192, keys=192, heads=4, groups=2, head_dim=64, value_dim=64, band_hi=0)


def emulated() -> tuple[Kernel, str]:
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    return Emulator(cached_library(), deterministic=True), "cpu"


def cuda() -> tuple[Kernel, str]:
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return CudaKernel(deterministic=True), "cuda"


def attend(kernel: Kernel, shards: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """out, lse, dq, dk and dv of one rank's shard."""
    q, k, v, dout = shards[torch.distributed.get_rank()]
    leaves = [x.requires_grad_() for x in (q, k, v)]
    attention = DistAttention(torch.distributed.group.WORLD, kernel=kernel)
    out, lse = attention.forward_with_lse(*leaves)
    grads = torch.autograd.grad(out, leaves, dout)
    return out.detach(), lse.detach(), *grads


@pytest.mark.parametrize(
    "gpu", [emulated, pytest.param(cuda, marks=pytest.mark.gpu)], ids=["emulated", "cuda"]
)
def test_two_ranks_on_one_gpu(gpu: Callable[[], tuple[Kernel, str]]) -> None:
    kernel, device = gpu()
    tensors = inputs(CASE, torch.bfloat16)
    shards = [tuple(x.chunk(2)[rank].clone() for x in tensors) for rank in range(2)]
    parts = run_ranks(2, attend, StagedKernel(kernel, device), shards)
    out, lse, *grads = (
        torch.cat(shard, 2 if number == 1 else 0) for number, shard in enumerate(zip(*parts, strict=True))
    )
    results: Results = (out.float(), lse, *(x.float() for x in grads))
    expect_within_budget(CASE, torch.bfloat16, tensors, results)
