"""The CUDA kernel on a real GPU: numbers against fp64, accumulation, streams and graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_lightseq.kernels.cuda import HEAD_DIMS, CudaKernel, missing_cuda
from tests.cuda.staged import StagedKernel
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
    Case(queries=1000, keys=1500, heads=2, groups=1, band_hi=500),
)


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
