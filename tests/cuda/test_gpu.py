"""The CUDA kernel on a real GPU: numbers against fp64, accumulation, streams, graphs, and two ranks on one GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from megatron_lightseq.attention import DistAttention
from megatron_lightseq.kernels.cuda import HEAD_DIMS, CudaKernel, missing_cuda
from megatron_lightseq.kernels.registry import TileMask
from tests.harness.ranks import run_ranks
from tests.kernels.oracle import Case, Results, expect_within_budget, inputs, run_kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
    pytest.mark.skipif(
        torch.cuda.is_available() and missing_cuda() is not None, reason="kernels built without CUDA"
    ),
]
AWKWARD = (
    Case(queries=100, keys=77),
    Case(queries=1, keys=1),
    Case(queries=150, keys=300, heads=4, groups=2, band_hi=150),
    Case(queries=130, keys=300, batch=2, band_lo=-30, band_hi=200),
    Case(queries=300, keys=290, ranges="documents", band_hi=0),
    Case(queries=90, keys=100, ranges="random"),
    Case(queries=100, keys=40, band_hi=-50),
    Case(queries=1000, keys=1500, heads=6, groups=2, band_hi=500),
)


@dataclass
class StagedKernel:
    """Runs tiles of CPU tensors on the GPU: what lets two gloo ranks share one."""

    kernel: CudaKernel
    name: str = "staged-cuda"

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        return None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        mask: TileMask,
        softmax_scale: float,
        accumulate: bool,
    ) -> None:
        staged_out, staged_lse = out.cuda(), lse.cuda()
        options = {"mask": _staged(mask), "softmax_scale": softmax_scale, "accumulate": accumulate}
        self.kernel.forward(q.cuda(), k.cuda(), v.cuda(), staged_out, staged_lse, **options)
        out.copy_(staged_out)
        lse.copy_(staged_lse)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        delta: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        *,
        mask: TileMask,
        softmax_scale: float,
    ) -> None:
        grads = [x.cuda() for x in (dq, dk, dv)]
        staged = [x.cuda() for x in (dout, q, k, v, lse, delta)]
        self.kernel.backward(*staged, *grads, mask=_staged(mask), softmax_scale=softmax_scale)
        for target, grad in zip((dq, dk, dv), grads, strict=True):
            target.copy_(grad)


def _staged(mask: TileMask) -> TileMask:
    return mask if mask.key_ranges is None else replace(mask, key_ranges=mask.key_ranges.cuda())


def on_gpu(case: Case, dtype: torch.dtype, *, deterministic: bool = False) -> Results:
    tensors = inputs(case, dtype)
    results = run_kernel(case, tensors, StagedKernel(CudaKernel(deterministic)))
    expect_within_budget(case, dtype, tensors, results)
    return results


@pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "deterministic"])
@pytest.mark.parametrize("dims", HEAD_DIMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", AWKWARD, ids=lambda case: f"{case.queries}x{case.keys}-{case.ranges}")
def test_matches_fp64(case: Case, dtype: torch.dtype, dims: tuple[int, int], deterministic: bool) -> None:
    on_gpu(replace(case, head_dim=dims[0], value_dim=dims[1]), dtype, deterministic=deterministic)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_deterministic_gradients_repeat(head_dim: int) -> None:
    case = replace(AWKWARD[-1], head_dim=head_dim, value_dim=head_dim)
    first = on_gpu(case, torch.bfloat16, deterministic=True)
    for _ in range(5):
        for want, got in zip(first, on_gpu(case, torch.bfloat16, deterministic=True), strict=True):
            assert torch.equal(want, got)


def test_runs_on_the_current_stream_and_in_a_graph() -> None:
    case = replace(AWKWARD[2], head_dim=128, value_dim=128)
    q, k, v, _ = (x.cuda() for x in inputs(case, torch.bfloat16))
    out = torch.full((case.queries, 1, case.heads, 128), float("nan"), device="cuda")
    lse = torch.full((1, case.heads, case.queries), float("nan"), device="cuda")
    options = {"mask": case.mask(), "softmax_scale": case.softmax_scale, "accumulate": False}
    CudaKernel().forward(q, k, v, out, lse, **options)
    want = out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        CudaKernel().forward(q, k, v, out, lse, **options)
    out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, want)


def _attend(shards: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    rank = torch.distributed.get_rank()
    q, k, v, dout = shards[rank]
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    attention = DistAttention(
        torch.distributed.group.WORLD, kernel=StagedKernel(CudaKernel(deterministic=True))
    )
    out = attention(q, k, v)
    out.backward(dout)
    return tuple(x.detach() for x in (out, q.grad, k.grad, v.grad))


def test_two_ranks_on_one_gpu() -> None:
    case = Case(queries=512, keys=512, heads=4, groups=2, head_dim=64, value_dim=64, band_hi=0)
    tensors = inputs(case, torch.bfloat16)
    shards = [tuple(x.chunk(2)[rank].clone() for x in tensors) for rank in range(2)]
    parts = run_ranks(2, _attend, shards)
    whole = run_kernel(case, tensors, StagedKernel(CudaKernel(deterministic=True)))
    for number, want in enumerate((whole[0], *whole[2:])):
        got = torch.cat([part[number] for part in parts]).float()
        assert (got - want).norm() <= 1e-2 * want.norm()
