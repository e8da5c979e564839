"""The row sums of out * dout, fused and by torch, against fp64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lightseq.kernels import delta as delta_module
from megatron_lightseq.kernels.delta import attention_delta
from megatron_lightseq.kernels.extension import load_extension
from tests.kernels.oracle import expect_close
from tests.kernels.test_cpu_numerics import VARIANTS, Variant, loaded

DTYPES = (torch.float32, torch.bfloat16)
PAIRS = list(itertools.product(DTYPES, DTYPES))
DIMS = (1, 7, 16, 64, 80, 113, 128, 257)
TOKENS, BATCH, HEADS = 37, 2, 3


@pytest.fixture(autouse=True)
def _extension() -> None:
    load_extension()


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[Variant]:
    with loaded(request.param) as worker:
        yield worker


def _normal(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _sliced(x: Tensor) -> Tensor:
    """Heads and head dim are the middle of wider dimensions: reading out of bounds yields NaN."""
    wide = torch.full((*x.shape[:2], x.shape[2] + 2, x.shape[3] + 9), float("nan"), dtype=x.dtype)
    return wide[:, :, 1:-1, 4 : 4 + x.shape[3]].copy_(x)


def _batch_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def _heads_first(x: Tensor) -> Tensor:
    return x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)


LAYOUTS = {"contiguous": Tensor.contiguous, "sliced": _sliced, "batch": _batch_first, "heads": _heads_first}


def _formula(out: Tensor, dout: Tensor, dtype: torch.dtype) -> Tensor:
    return (out.to(dtype) * dout.to(dtype)).sum(-1).permute(1, 2, 0)


def _expect_delta(what: str, got: Tensor, out: Tensor, dout: Tensor) -> None:
    want, low = (_formula(out, dout, dtype) for dtype in (torch.float64, torch.float32))
    assert got.shape == want.shape, what
    expect_close(what, got, want, low, out.shape[3] ** 0.5)


def _check_layouts(dim: int, out_dtype: torch.dtype, dout_dtype: torch.dtype) -> None:
    """Every pair of memory layouts gives a bitwise identical delta, in strided memory that was filled with NaN."""
    out = _normal(out_dtype, TOKENS, BATCH, HEADS, dim)
    dout = _normal(dout_dtype, TOKENS, BATCH, HEADS, dim, seed=1)
    first = attention_delta(out, dout)
    assert first.dtype == torch.float32
    assert first.is_contiguous()
    _expect_delta(f"delta of {out_dtype} and {dout_dtype}, Dv = {dim}", first, out, dout)
    for names in itertools.product(LAYOUTS, LAYOUTS):
        strided = torch.full((TOKENS, HEADS, BATCH), float("nan")).permute(2, 1, 0)
        torch.ops.mls.attention_delta(LAYOUTS[names[0]](out), LAYOUTS[names[1]](dout), strided)
        assert torch.equal(strided, first), names


@pytest.mark.parametrize(("out_dtype", "dout_dtype"), PAIRS, ids=str)
@pytest.mark.parametrize("dim", DIMS)
def test_error_budget(variant: Variant, dim: int, out_dtype: torch.dtype, dout_dtype: torch.dtype) -> None:
    variant.call(_check_layouts, dim, out_dtype, dout_dtype)


@pytest.mark.parametrize("shape", [(0, 2, 3, 16), (5, 0, 3, 16), (5, 2, 0, 16), (5, 2, 3, 0), (1, 1, 1, 1)])
def test_empty_and_single(shape: tuple[int, int, int, int]) -> None:
    got = attention_delta(torch.full(shape, 3.0), torch.full(shape, 2.0))
    want = torch.full((shape[1], shape[2], shape[0]), 6.0 * shape[3])
    assert torch.equal(got, want)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("out_dtype", "dout_dtype"), PAIRS, ids=str)
def test_the_same_on_any_number_of_threads(out_dtype: torch.dtype, dout_dtype: torch.dtype) -> None:
    """Uses enough tokens for every thread to get some."""
    out, dout = _normal(out_dtype, 2051, 1, 4, 80), _normal(dout_dtype, 2051, 1, 4, 80, seed=1)
    torch.set_num_threads(1)
    want = attention_delta(out, dout)
    _expect_delta("delta of many tokens", want, out, dout)
    for count in (2, 3, 8):
        torch.set_num_threads(count)
        assert torch.equal(attention_delta(out, dout), want), f"differs on {count} threads"


def test_nan_stays_in_its_row() -> None:
    out, dout = _normal(torch.bfloat16, 40, 1, 2, 33), _normal(torch.bfloat16, 40, 1, 2, 33, seed=1)
    want = attention_delta(out, dout)
    out[7, 0, 1, 32] = float("nan")
    got = attention_delta(out, dout)
    assert got[0, 1, 7].isnan()
    got[0, 1, 7] = want[0, 1, 7]
    assert torch.equal(got, want)


def test_fp64_is_left_to_torch() -> None:
    out, dout = (_normal(torch.float32, 9, 2, 3, 20, seed=seed).double() for seed in (0, 1))
    got = attention_delta(out, dout)
    assert got.dtype == torch.float64
    assert got.is_contiguous()
    assert torch.equal(got, _formula(out, dout, torch.float64))


def test_other_dtypes_and_strides_are_left_to_torch() -> None:
    out, dout = (_normal(torch.float32, 9, 2, 3, 20, seed=seed) for seed in (0, 1))
    halves = attention_delta(out.half(), dout.half())
    assert torch.equal(halves, _formula(out.half(), dout.half(), torch.float32))
    broadcast = torch.ones(()).expand(out.shape)  # the gradient of a sum
    _expect_delta("delta of a broadcast", attention_delta(out, broadcast), out, broadcast)


def test_without_the_compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta_module, "missing_extension", lambda: "not built")
    out, dout = _normal(torch.float32, 9, 2, 3, 20), _normal(torch.bfloat16, 9, 2, 3, 20, seed=1)
    assert torch.equal(attention_delta(out, dout), _formula(out, dout, torch.float32))


def test_op_is_registered_as_torch_wants() -> None:
    out, dout = _normal(torch.float32, 9, 2, 3, 20), _normal(torch.bfloat16, 9, 2, 3, 20, seed=1)
    torch.library.opcheck(torch.ops.mls.attention_delta.default, (out, dout, torch.empty(2, 3, 9)))


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        (
            "out",
            torch.zeros(6, 4, 8),
            r"out has shape \(6, 4, 8\): it must have 4 dimensions \(Sq, B, H, Dv\)",
        ),
        (
            "dout",
            torch.zeros(6, 1, 4, 7),
            r"dout has shape \(6, 1, 4, 7\): .* \(Sq, B, H, Dv\) = \(6, 1, 4, 8\)",
        ),
        ("out", torch.zeros(6, 1, 4, 8).half(), "out is float16: the fused kernel takes float32 or bfloat16"),
        (
            "dout",
            torch.zeros(6, 1, 4, 8).double(),
            "dout is float64: the fused kernel takes float32 or bfloat16",
        ),
        ("out", torch.zeros(6, 1, 8, 4).mT, "out has stride 4 in its last dimension: it must be contiguous"),
        ("dout", torch.zeros(6, 1, 8, 4).mT, "dout has stride 4 in its last dimension"),
        (
            "delta",
            torch.zeros(1, 6, 4),
            r"delta has shape \(1, 6, 4\): it must be \(B, H, Sq\) = \(1, 4, 6\)",
        ),
        ("delta", torch.zeros(1, 4, 6).bfloat16(), "delta is bfloat16: it must be float32, the accumulator"),
    ],
)
def test_refuses(name: str, wrong: Tensor, message: str) -> None:
    tensors: dict[str, Any] = {"out": torch.zeros(6, 1, 4, 8), "dout": torch.zeros(6, 1, 4, 8)}
    tensors["delta"] = torch.zeros(1, 4, 6)
    torch.ops.mls.attention_delta(**tensors)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.mls.attention_delta(**(tensors | {name: wrong}))
