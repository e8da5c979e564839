"""The AMX kernels with emulated tile instructions: the same source, on processors without AMX."""

from __future__ import annotations

import pytest
import torch

from megatron_lightseq.kernels.registry import Kernel
from tests.kernels import emulated_amx
from tests.kernels.emulated_amx import EmulatedAmxKernel
from tests.kernels.oracle import NAMES, Case, expect_within_budget, inputs, run_kernel
from tests.kernels.test_cpu_numerics import CASES, DTYPES, loaded

pytestmark = pytest.mark.skipif(emulated_amx.missing() is not None, reason=str(emulated_amx.missing()))
KERNEL = EmulatedAmxKernel()


def test_fulfils_the_protocol() -> None:
    assert isinstance(KERNEL, Kernel)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_budget(case: Case, dtype: torch.dtype) -> None:
    tensors = inputs(case, dtype)
    expect_within_budget(case, dtype, tensors, run_kernel(case, tensors, KERNEL))


def _run(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    return list(run_kernel(case, inputs(case, dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_the_processor(dtype: torch.dtype) -> None:
    """Runs on processors with AMX. Only rounding within a tile product may differ."""
    case = Case(queries=200, keys=333, heads=4, groups=2, head_dim=64, value_dim=64, band_hi=133)
    with loaded("amx_tiles") as variant:
        real = variant.call(_run, case, dtype)
    for name, got, want in zip(NAMES, run_kernel(case, inputs(case, dtype), KERNEL), real, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3, msg=name)
