"""The CUDA kernel on a real GPU: accuracy against fp64, which kernels ran, memory layouts, streams and graphs.

scripts/gpu_check.sh runs them in separate processes, grouped by function and last parameter (tests/cuda/apart.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_lightseq.kernels.cuda import HEAD_DIMS, CudaKernel, missing_cuda
from tests.cuda.judge import expect_gradients, expect_output, run_forward
from tests.cuda.staged import StagedKernel
from tests.kernels.oracle import Case, Results, delta, expect_within_budget, inputs, run_kernel

DEVICE = "cuda"
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
    Case(queries=150, keys=200, heads=4, groups=2, band_hi=50, amplitude=8.0, softcap=5.0),
    Case(queries=1000, keys=1500, heads=2, groups=1, band_hi=500),
)
HOPPER_BACKWARD = ((64, 64), (80, 80), (96, 96), (128, 128))
"""(D, Dv) that have Hopper backward kernels."""

every_head_dim = pytest.mark.parametrize("dims", HEAD_DIMS, ids=lambda dims: "d{}x{}".format(*dims))
every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
every_case = pytest.mark.parametrize(
    "case",
    AWKWARD,
    ids=lambda case: f"{case.queries}x{case.keys}_{case.ranges}{'_softcap' * bool(case.softcap)}",
)
both_ways = pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "deterministic"])


def staged(deterministic: bool = False) -> StagedKernel:
    return StagedKernel(CudaKernel(deterministic), DEVICE)


@every_head_dim
@every_dtype
@every_case
def test_forward_matches_fp64(case: Case, dtype: torch.dtype, dims: tuple[int, int]) -> None:
    case = replace(case, head_dim=dims[0], value_dim=dims[1])
    tensors = inputs(case, dtype)
    expect_output(case, dtype, tensors, *run_forward(case, tensors, staged()))


@every_head_dim
@both_ways
@every_dtype
@every_case
def test_backward_matches_fp64(
    case: Case, dtype: torch.dtype, deterministic: bool, dims: tuple[int, int]
) -> None:
    case = replace(case, head_dim=dims[0], value_dim=dims[1])
    expect_gradients(case, dtype, inputs(case, dtype), staged(deterministic))


def both_directions(case: Case) -> Results:
    tensors = inputs(case, torch.bfloat16)
    results = run_kernel(case, tensors, staged(deterministic=True))
    expect_within_budget(case, torch.bfloat16, tensors, results)
    return results


@pytest.mark.parametrize("head_dim", [64, 128])
def test_deterministic_gradients_repeat(head_dim: int) -> None:
    case = replace(AWKWARD[-1], head_dim=head_dim, value_dim=head_dim)
    first = both_directions(case)
    for _ in range(5):
        for want, got in zip(first, both_directions(case), strict=True):
            assert torch.equal(want, got)


class OnGpu:
    """One case, its tensors and results on the GPU. ``run`` is a training step without host syncs or allocations."""

    def __init__(self, case: Case, deterministic: bool) -> None:
        self.kernel = CudaKernel(deterministic)
        self.options = {"mask": case.mask(), "softmax_scale": case.softmax_scale}
        self.q, self.k, self.v, self.dout = (x.to(DEVICE) for x in inputs(case, torch.bfloat16))
        self.out = torch.zeros(self.dout.shape, device=DEVICE)
        self.lse = torch.zeros(case.batch, case.heads, case.queries, device=DEVICE)
        self.grads = [torch.zeros(x.shape, device=DEVICE) for x in (self.q, self.k, self.v)]

    def run(self) -> None:
        self.kernel.forward(self.q, self.k, self.v, self.out, self.lse, accumulate=False, **self.options)
        for grad in self.grads:
            grad.zero_()
        rows = self.lse, delta(self.out, self.dout)
        self.kernel.backward(self.dout, self.q, self.k, self.v, *rows, *self.grads, **self.options)

    def results(self) -> list[Tensor]:
        return [x.clone() for x in (self.out, self.lse, *self.grads)]


@every_head_dim
@both_ways
def test_this_gpu_s_own_kernels_run(deterministic: bool, dims: tuple[int, int]) -> None:
    """Not the kernels for 8.0, which are the fallback if the driver refuses tensor maps."""
    step = OnGpu(replace(AWKWARD[2], head_dim=dims[0], value_dim=dims[1]), deterministic)
    with warnings.catch_warnings(record=True) as reasons:
        warnings.simplefilter("always")
        step.run()
    assert not reasons, str(reasons[0].message)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step.run()
        torch.cuda.synchronize()
    names = " ".join(event.key for event in profile.key_averages())
    if "attention_" not in names:
        pytest.skip(f"the profiler sees no kernels of ours: {names or 'none at all'}")
    hopper = torch.cuda.get_device_capability() == (9, 0)
    backward = "sm90" if hopper and dims in HOPPER_BACKWARD else "sm80"
    for wanted in (
        f"attention_forward_{'sm90' if hopper else 'sm80'}<",
        f"attention_backward_{backward}<",
        *([f"attention_backward_dq_{backward}<"] if deterministic else []),
    ):
        assert wanted in names


def packed(x: Tensor) -> Tensor:
    """The same numbers with other vectors in between, as in a fused q, k, v projection."""
    return torch.stack([torch.full_like(x, 7.0), x, torch.full_like(x, -7.0)], 3)[..., 1, :]


def heads_first(x: Tensor) -> Tensor:
    return x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)


def expanded(x: Tensor) -> Tensor:
    """All heads are views of the first one."""
    return x[:, :, :1].expand(x.shape)


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("arrange", [packed, heads_first, expanded])
def test_arrangement_in_memory_does_not_matter(arrange: Callable[[Tensor], Tensor], head_dim: int) -> None:
    case = Case(queries=150, keys=300, batch=2, heads=4, groups=2, head_dim=head_dim, value_dim=head_dim)
    step = OnGpu(case, deterministic=True)
    step.q, step.k, step.v, step.dout = (arrange(x) for x in (step.q, step.k, step.v, step.dout))
    step.run()
    got = step.results()
    step.q, step.k, step.v, step.dout = (x.contiguous() for x in (step.q, step.k, step.v, step.dout))
    step.run()
    for first, second in zip(got, step.results(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("head_dim", [80, 128])
@both_ways
def test_training_step_in_a_graph(deterministic: bool, head_dim: int) -> None:
    """A graph captured on a side stream and replayed on other numbers gives the same results as without a graph."""
    step = OnGpu(replace(AWKWARD[2], head_dim=head_dim, value_dim=head_dim), deterministic)
    step.run()  # loads the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run()
    for factor in (0.5, -0.75):
        step.q *= factor
        step.dout *= factor
        for result in (step.out, step.lse, *step.grads):
            result.fill_(float("nan"))
        graph.replay()
        got = step.results()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step.run()
        torch.cuda.current_stream().wait_stream(side)
        for name, first, second in zip(("out", "lse", "dq", "dk", "dv"), got, step.results(), strict=True):
            if name in ("dq", "dk", "dv") and not deterministic:
                torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
            else:
                assert torch.equal(first, second), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second GPU here")
def test_tensors_of_two_gpus_are_refused() -> None:
    step = OnGpu(replace(AWKWARD[0], head_dim=64, value_dim=64), deterministic=False)
    step.out = step.out.to("cuda:1")
    with pytest.raises(
        RuntimeError, match="out is on GPU 1 and q on GPU 0: all tensors of a call must be on"
    ):
        step.run()
