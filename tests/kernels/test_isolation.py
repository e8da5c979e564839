"""Rows and keys that the mask separates do not affect each other, even with values that are not finite.

One document holds NaN, infinity or values so large that their products overflow: as in varlen kernels, the results of
other documents are the same as if it held ordinary numbers. The same holds for future tokens under a causal mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megatron_lightseq.kernels.reference import ReferenceKernel
from megatron_lightseq.kernels.registry import Kernel
from tests.kernels import emulated_amx
from tests.kernels.emulated_amx import EmulatedAmxKernel
from tests.kernels.oracle import Case, Results, inputs, run_kernel
from tests.kernels.test_cpu_numerics import VARIANTS, Variant, loaded

NAMES = ("q", "k", "v", "dout")
NAN, INF = float("nan"), float("inf")
SPOILED = (
    *((value, "all") for value in (NAN, INF, -INF, 3e38)),
    *((value, name) for value in (NAN, -INF) for name in NAMES),
    *((3e38, name) for name in ("v", "dout")),  # finite, but their product is not
)
DTYPES = (torch.float32, torch.bfloat16)
BORDERS = (0, 3, 90, 97, 333, 341, 500)
"""Documents of very different lengths; borders are inside row tiles, blocks of keys and vectors."""
TOKENS = BORDERS[-1]
CAUSAL = Case(queries=TOKENS, keys=TOKENS, heads=4, groups=2, head_dim=24, value_dim=40, band_hi=0)
CASES = {
    "causal": CAUSAL,
    "full": replace(CAUSAL, band_hi=TOKENS),
    "window": replace(CAUSAL, band_lo=-20),
    "whole-tiles": replace(CAUSAL, heads=1, groups=1, head_dim=64, value_dim=64),
}


class Packed(Case):
    """A case with the documents of BORDERS."""

    def key_ranges(self) -> Tensor:
        begin, end = torch.zeros(TOKENS, dtype=torch.int32), torch.zeros(TOKENS, dtype=torch.int32)
        for first, last in pairwise(BORDERS):
            begin[first:last], end[first:last] = first, last
        return torch.stack([begin, end])


def packed(case: Case) -> Case:
    fields = {name: getattr(case, name) for name in Case.__dataclass_fields__}
    return Packed(**fields)


def spoil(tensors: tuple[Tensor, ...], rows: slice, value: float, which: str) -> tuple[Tensor, ...]:
    """Copies of q, k, v, dout with ``value`` in these rows: everywhere in all four, or in a few elements of one."""
    spoiled = [x.clone() for x in tensors]
    for name, x in zip(NAMES, spoiled, strict=True):
        if which == "all":
            x[rows] = value
        elif which == name:
            x[rows][::2, :, -1, 5] = value
    return tuple(spoiled)


def expect_isolated(got: Results, want: Results, out_rows: Tensor, key_rows: Tensor, what: str) -> None:
    """Checks that the results of these rows (out, lse, dq) and keys (dk, dv) are as expected."""
    out, lse, dq, dk, dv = zip(got, want, strict=True)
    for name, (result, expected) in {"out": out, "dq": dq, "lse": lse}.items():
        if name == "lse":
            result, expected = (x.permute(2, 0, 1) for x in (result, expected))
        torch.testing.assert_close(
            result[out_rows], expected[out_rows], rtol=1e-4, atol=1e-5, msg=f"{name}: {what}"
        )
    for name, (result, expected) in {"dk": dk, "dv": dv}.items():
        torch.testing.assert_close(
            result[key_rows], expected[key_rows], rtol=1e-4, atol=1e-5, msg=f"{name}: {what}"
        )


def check_documents(case: Case, dtype: torch.dtype, kernel: Kernel | None = None) -> None:
    """Spoils a long and a short document in turn. The results of the others must not change."""
    case, tensors = packed(case), inputs(case, dtype)
    want = run_kernel(case, tensors, kernel)
    for document in (1, 4):
        rows = slice(BORDERS[document], BORDERS[document + 1])
        others = torch.ones(TOKENS, dtype=torch.bool)
        others[rows] = False
        for value, only in SPOILED:
            got = run_kernel(case, spoil(tensors, rows, value, only), kernel)
            expect_isolated(got, want, others, others, f"{value} in {only} of document {document}, {case}")


def check_future(dtype: torch.dtype, kernel: Kernel | None = None) -> None:
    """Under a causal mask, future tokens do not affect the results of a query."""
    tensors = inputs(CAUSAL, dtype)
    want = run_kernel(CAUSAL, tensors, kernel)
    for first in (1, 130):
        past, nobody = torch.arange(TOKENS) < first, torch.zeros(TOKENS, dtype=torch.bool)
        for value, only in SPOILED:
            got = run_kernel(CAUSAL, spoil(tensors, slice(first, None), value, only), kernel)
            expect_isolated(got, want, past, nobody, f"{value} in {only} from {first} on")


def check_seen(dtype: torch.dtype, kernel: Kernel | None = None) -> None:
    """Non-finite values are not hidden: every result that depends on one is not finite either."""
    case = replace(CAUSAL, head_dim=8, value_dim=8)
    tensors = inputs(case, dtype)
    key = 100
    for value in (NAN, INF, -INF):
        v = tensors[2].clone()
        v[key, 0, 1, 3] = value
        out, *_ = run_kernel(case, (*tensors[:2], v, tensors[3]), kernel)
        assert not out[key:, 0, 2:, 3].isfinite().any()
        assert out[:key].isfinite().all()
        dout = tensors[3].clone()
        dout[key, 0, 2, 3] = value
        *_, dv = run_kernel(case, (*tensors[:3], dout), kernel)
        assert not dv[: key + 1, 0, 1, 3].isfinite().any()
        assert dv[key + 1 :].isfinite().all()
    for index, rows in ((0, slice(0, key + 1)), (1, slice(key, None))):  # q reaches dk, k reaches dq
        changed = list(tensors)
        changed[index] = tensors[index].clone()
        changed[index][key, 0, -1, 3] = float("nan")
        _, _, dq, dk, _ = run_kernel(case, tuple(changed), kernel)
        result = (dk, dq)[index]
        assert not result[rows, 0, -1].isfinite().any()


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[Variant]:
    with loaded(request.param) as worker:
        yield worker


KERNELS = {
    "reference": ReferenceKernel(),
    "amx": pytest.param(
        EmulatedAmxKernel(),
        marks=pytest.mark.skipif(emulated_amx.missing() is not None, reason=str(emulated_amx.missing())),
    ),
}
every_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every_dtype
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_documents_are_isolated(variant: Variant, case: Case, dtype: torch.dtype) -> None:
    variant.call(check_documents, case, dtype)


@every_dtype
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@every_kernel
def test_documents_are_isolated_by(kernel: Kernel, case: Case, dtype: torch.dtype) -> None:
    check_documents(case, dtype, kernel)


@every_dtype
def test_the_future_is_isolated(variant: Variant, dtype: torch.dtype) -> None:
    variant.call(check_future, dtype)


@every_dtype
@every_kernel
def test_the_future_is_isolated_by(kernel: Kernel, dtype: torch.dtype) -> None:
    check_future(dtype, kernel)


@every_dtype
def test_what_is_seen_is_not_hidden(variant: Variant, dtype: torch.dtype) -> None:
    variant.call(check_seen, dtype)


@every_dtype
@every_kernel
def test_what_is_seen_is_not_hidden_by(kernel: Kernel, dtype: torch.dtype) -> None:
    check_seen(dtype, kernel)
