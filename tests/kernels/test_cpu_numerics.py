"""The CPU kernel against fp64, in every instruction-set variant that this machine runs."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_lightseq.kernels.cpu import CpuKernel
from tests.kernels.oracle import Case, Results, check, delta, expect_close, inputs, run_kernel

VARIANTS = ("amx", "amx_tiles", "avx512_bf16", "avx512", "avx2", "baseline")
DTYPES = (torch.float32, torch.bfloat16)

CAUSAL = {"band_hi": 0}
CASES = [
    # head dims: common, small, odd, and different for values
    *[Case(queries=65, keys=130, head_dim=d, value_dim=d) for d in (1, 7, 24, 33, 40, 64, 80, 96, 128)],
    Case(queries=65, keys=130, head_dim=192, value_dim=128),
    Case(queries=65, keys=130, head_dim=24, value_dim=200),
    # heads: multi-head, grouped, multi-query; a group size that does not divide a tile; batch
    Case(queries=70, keys=70, heads=3, groups=3, **CAUSAL),
    Case(queries=70, keys=70, heads=6, groups=2, batch=2, **CAUSAL),
    Case(queries=70, keys=70, heads=7, groups=1, batch=3, **CAUSAL),
    # lengths: one token, less than one vector, several blocks and chunks, more or fewer keys than queries
    Case(queries=1, keys=1, **CAUSAL),
    Case(queries=1, keys=333, heads=4),
    Case(queries=7, keys=7, **CAUSAL),
    Case(queries=333, keys=333, head_dim=64, value_dim=64, **CAUSAL),
    Case(queries=333, keys=7, head_dim=32, value_dim=32),
    Case(queries=300, keys=900, heads=1, band_hi=600),
    Case(queries=900, keys=300, heads=1, band_hi=-600),
    # bands: windows, offsets, nothing visible
    Case(queries=333, keys=333, band_lo=-50, band_hi=0),
    Case(queries=200, keys=500, band_lo=37, band_hi=290),
    Case(queries=200, keys=200, band_lo=-3, band_hi=5, heads=4, groups=2),
    Case(queries=90, keys=90, band_lo=91),
    Case(queries=90, keys=90, band_lo=5, band_hi=-5),
    # documents, ragged and empty ranges, with and without a band
    Case(queries=333, keys=333, ranges="documents", **CAUSAL),
    Case(queries=333, keys=200, ranges="documents", heads=4, groups=2),
    Case(queries=333, keys=500, ranges="random"),
    Case(queries=150, keys=150, ranges="random", band_lo=-20, band_hi=0),
    Case(queries=50, keys=50, ranges="empty"),
    # several panels of keys; a window that begins in the middle of one
    Case(queries=70, keys=2000, head_dim=256, value_dim=256, band_hi=1800),
    Case(queries=200, keys=2000, head_dim=256, value_dim=256, band_lo=900, band_hi=1100),
    # a softmax that is close to a hard maximum
    Case(queries=129, keys=400, head_dim=64, value_dim=64, amplitude=20.0),
]
CAPPED = [  # scores far beyond the softcap, and in its linear part
    Case(queries=129, keys=400, head_dim=64, value_dim=64, amplitude=8.0, softcap=3.0),
    Case(queries=90, keys=100, ranges="random", amplitude=20.0, softcap=50.0),
]


def _choose_variant(name: str) -> None:
    os.environ["MLS_CPU_ISA"] = name
    torch.set_num_threads(1)


def _loaded_variant() -> str:
    return CpuKernel().isa


class Variant:
    """A process that uses one variant. The variant is chosen once per process, when the extension is loaded."""

    def __init__(self, name: str) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_choose_variant, initargs=(name,))

    def call(self, function: Callable[..., Any], *args: object) -> Any:
        return self.pool.submit(function, *args).result(timeout=120)


@contextmanager
def loaded(name: str) -> Iterator[Variant]:
    """The variant of this name. Skips the test if the machine cannot run it."""
    worker = Variant(name)
    try:
        assert worker.call(_loaded_variant) == name
        yield worker
    except Exception as error:
        if "have no such variant" not in str(error):
            raise
        pytest.skip(f"this machine does not run {name}")
    finally:
        worker.pool.shutdown()


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[Variant]:
    with loaded(request.param) as worker:
        yield worker


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *CAPPED], ids=str)
def test_error_budget(variant: Variant, case: Case, dtype: torch.dtype) -> None:
    variant.call(check, case, dtype)


def _rounds(case: Case) -> None:
    q, k, v, dout = inputs(case, torch.bfloat16)
    q[0, 0, 0] = float("nan")  # must stay NaN when it is rounded
    options: dict[str, Any] = {
        "mask": case.mask(),
        "softmax_scale": case.softmax_scale,
        "accumulate": False,
    }
    lse = torch.empty(case.batch, case.heads, case.queries)
    out, rounded_lse = torch.empty(dout.shape), torch.empty_like(lse)
    CpuKernel().forward(q, k, v, out, lse, **options)
    rounded = torch.full((case.queries, case.batch, case.heads, case.value_dim + 3), 7.0).bfloat16()
    CpuKernel().forward(q, k, v, rounded[..., 2:-1], rounded_lse, **options)
    torch.testing.assert_close(rounded[..., 2:-1], out.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(rounded_lse, lse, rtol=0, atol=0, equal_nan=True)
    assert (torch.cat([rounded[..., :2], rounded[..., -1:]], -1) == 7).all()


@pytest.mark.parametrize("case", [case for case in CASES if case.amplitude == 1.0][::2], ids=str)
def test_an_output_of_the_inputs_dtype_is_the_other_one_rounded(variant: Variant, case: Case) -> None:
    variant.call(_rounds, case)


def _padded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """NaN in a view of x's shape, with sevens around it in the last dimension."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), 7.0, dtype=dtype)
    wide[..., 2:-1] = float("nan")
    return wide


def _overwrites(case: Case, dtype: torch.dtype) -> None:
    q, k, v, dout = inputs(case, dtype)
    out, lse, *sums = run_kernel(case, (q, k, v, dout))
    options: dict[str, Any] = case.options()
    for target in {torch.float32, dtype}:
        wide = [_padded(x, target) for x in (q, k, v)]
        places = [x[..., 2:-1] for x in wide]
        CpuKernel().backward(dout, q, k, v, lse, delta(out, dout), *places, accumulate=False, **options)
        for place, total in zip(places, sums, strict=True):
            # Rounded dq is summed in another buffer and scaled at the end, so it may differ by one bf16 rounding.
            tolerance = (
                {"rtol": 0.0, "atol": 0.0} if target == torch.float32 else {"rtol": 2**-7, "atol": 1e-5}
            )
            torch.testing.assert_close(place, total.to(target), **tolerance)
        assert all((torch.cat([x[..., :2], x[..., -1:]], -1) == 7).all() for x in wide)


OVERWRITTEN = [
    *CASES[::2],
    Case(queries=70, keys=900, head_dim=64, value_dim=64, band_lo=-5, band_hi=3),  # chunks seen by no row
    Case(queries=900, keys=70, band_lo=-5, band_hi=3),  # row tiles that see no key
    Case(queries=5, keys=0),
    Case(queries=0, keys=5),
    Case(queries=300, keys=1900, heads=1, head_dim=64, value_dim=64, band_hi=1600),  # several chunks
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", OVERWRITTEN, ids=str)
def test_gradients_overwrite_what_was_there(variant: Variant, case: Case, dtype: torch.dtype) -> None:
    variant.call(_overwrites, case, dtype)


def _forgets() -> None:
    """Calls reuse scratch memory, whose old contents must not leak into rows that see no key."""
    seeing = Case(queries=70, keys=70, head_dim=64, value_dim=64)
    q, k, v, dout = inputs(seeing, torch.bfloat16)
    run_kernel(seeing, (q, k, torch.full_like(v, float("nan")), dout))
    out, lse, *_ = run_kernel(replace(seeing, ranges="empty"), (q, k, v, dout))
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, float("-inf")))


def test_no_output_of_an_earlier_call_is_left(variant: Variant) -> None:
    variant.call(_forgets)


def _results(case: Case) -> Results:
    return run_kernel(case, inputs(case, torch.float32))


TILES_OR_VECTORS = [
    (Case(queries=600, keys=600, heads=1, band_hi=0), "amx_tiles"),
    (Case(queries=600, keys=600, heads=1, band_lo=-99, band_hi=0), "avx512"),  # rows see few keys
    (Case(queries=99, keys=600, heads=1), "avx512"),  # keys are seen by few rows
    (Case(queries=99, keys=600, heads=4, groups=1), "amx_tiles"),  # keys are seen by many rows of the group
]


def test_fp32_uses_tiles_where_they_are_faster() -> None:
    """Compared bit for bit: tiles and vectors round differently."""
    with loaded("amx") as amx, loaded("amx_tiles") as tiles, loaded("avx512") as vectors:
        for case, same_as in TILES_OR_VECTORS:
            results = amx.call(_results, case)
            wanted = {"amx_tiles": tiles.call(_results, case), "avx512": vectors.call(_results, case)}
            equal = [name for name, want in wanted.items() if all(map(torch.equal, results, want))]
            assert equal == [same_as], case


SIZES = st.integers(1, 150)
DIMS = st.integers(1, 70)
OFFSETS = st.integers(-160, 160)


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    groups, group = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    return Case(
        queries=draw(SIZES),
        keys=draw(SIZES),
        heads=groups * group,
        groups=groups,
        head_dim=draw(DIMS),
        value_dim=draw(DIMS),
        band_lo=draw(OFFSETS),
        band_hi=draw(OFFSETS),
        ranges=draw(st.sampled_from(["none", "none", "documents", "random"])),
    )


@settings(max_examples=60)
@given(case=random_cases(), dtype=st.sampled_from(DTYPES))
def test_error_budget_anywhere(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: x.index_put((torch.tensor(3),), x[3] + 1e-3), r"largest error .*, 1 of 50 .* \(3\.\.3\)"),
        (lambda x: x + 2e-5, "error"),
        (
            lambda x: x.index_put((torch.tensor(3),), torch.tensor(float("nan"))),
            r"first at \(3,\): nan, wanted 0",
        ),
        (
            lambda x: x.index_put((torch.tensor(0),), torch.tensor(0.0)),
            r"infinities differ, 1 of 50 .* wanted -inf",
        ),
    ],
)
def test_budget_sees_wrong_results(wrong: Callable[[torch.Tensor], torch.Tensor], message: str) -> None:
    want = torch.linspace(0, 1, 50, dtype=torch.float64)
    want[0] = float("-inf")
    low = want.float() + 1e-6
    expect_close("right", want.float(), want, low)
    with pytest.raises(AssertionError, match=message):
        expect_close("wrong", wrong(want.float()), want, low)
