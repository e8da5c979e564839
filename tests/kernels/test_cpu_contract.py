"""The CPU kernel's contract: accumulation, strides, reproducibility, refusals."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lightseq.errors import UnsupportedError
from megatron_lightseq.kernels import extension
from megatron_lightseq.kernels.cpu import CpuKernel
from megatron_lightseq.kernels.cuda import CudaKernel
from megatron_lightseq.kernels.registry import Kernel
from megatron_lightseq.kernels.source_hash import source_hash
from megatron_lightseq.kernels.tile_mask import TileMask
from tests.kernels.oracle import (
    NAMES,
    Case,
    delta,
    expect_within_budget,
    inputs,
    run_kernel,
    with_keys,
)

DTYPES = (torch.float32, torch.bfloat16)
CAUSAL = Case(queries=333, keys=500, heads=4, groups=2, head_dim=40, value_dim=24, band_hi=167)
KERNEL = CpuKernel()


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_fulfils_the_protocol() -> None:
    assert isinstance(KERNEL, Kernel)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_tiles_equal_one(dtype: torch.dtype) -> None:
    q, k, v, dout = inputs(CAUSAL, dtype)
    out = torch.full((CAUSAL.queries, 1, 4, 24), float("nan"))
    lse = torch.full((1, 4, CAUSAL.queries), float("nan"))
    tiles = [(350, 500), (0, 1), (1, 130), (130, 350)]  # out of order; the first leaves most rows empty
    for number, (first, last) in enumerate(tiles):
        options = {"mask": with_keys(CAUSAL, first, last).mask(), "softmax_scale": CAUSAL.softmax_scale}
        KERNEL.forward(q, k[first:last], v[first:last], out, lse, accumulate=number > 0, **options)
    dq, dk, dv = (torch.zeros(x.shape) for x in (q, k, v))
    for first, last in tiles:
        options = {"mask": with_keys(CAUSAL, first, last).mask(), "softmax_scale": CAUSAL.softmax_scale}
        part = slice(first, last)
        KERNEL.backward(dout, q, k[part], v[part], lse, delta(out, dout), dq, dk[part], dv[part], **options)
    expect_within_budget(CAUSAL, dtype, (q, k, v, dout), (out, lse, dq, dk, dv))


def test_tile_without_keys_changes_nothing() -> None:
    q, k, v, _ = inputs(CAUSAL, torch.float32)
    out, lse = torch.randn(CAUSAL.queries, 1, 4, 24), torch.randn(1, 4, CAUSAL.queries)
    want = out.clone(), lse.clone()
    nothing = TileMask(600, 700)
    KERNEL.forward(q, k, v, out, lse, mask=nothing, softmax_scale=1.0, accumulate=True)
    assert torch.equal(out, want[0])
    assert torch.equal(lse, want[1])


def test_rows_without_keys_are_empty() -> None:
    case = Case(queries=100, keys=40, band_hi=-50)  # only rows from 50 on see a key
    out, lse, dq, _, _ = run_kernel(case, inputs(case, torch.float32))
    assert torch.equal(out[:50], torch.zeros_like(out[:50]))
    assert lse[..., :50].isneginf().all()
    assert torch.equal(dq[:50], torch.zeros_like(dq[:50]))
    assert lse[..., 50:].isfinite().all()


def test_no_keys_at_all() -> None:
    case = Case(queries=5, keys=0)
    out, lse, dq, _, _ = run_kernel(case, inputs(case, torch.float32))
    assert torch.equal(out, torch.zeros_like(out))
    assert lse.isneginf().all()
    assert torch.equal(dq, torch.zeros_like(dq))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_added(dtype: torch.dtype) -> None:
    q, k, v, dout = inputs(CAUSAL, dtype)
    out, lse, *gradients = run_kernel(CAUSAL, (q, k, v, dout))
    sums = [torch.full(x.shape, 64.0) for x in (q, k, v)]
    options = {"mask": CAUSAL.mask(), "softmax_scale": CAUSAL.softmax_scale}
    KERNEL.backward(dout, q, k, v, lse, delta(out, dout), *sums, **options)
    for total, gradient in zip(sums, gradients, strict=True):
        torch.testing.assert_close(total - 64.0, gradient, rtol=0, atol=3e-5)


# bf16 rows that fill whole tiles are read in place; others are copied and padded with zeros.
LAID_OUT = {
    "grouped": CAUSAL,
    "widths-that-are-no-tiles": replace(CAUSAL, heads=2),
    "widths-of-whole-tiles": replace(CAUSAL, heads=2, head_dim=64, value_dim=32),
    "odd-strides": replace(CAUSAL, heads=1, groups=1, head_dim=64, value_dim=32),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LAID_OUT.values(), ids=LAID_OUT)
def test_strided_tensors(case: Case, dtype: torch.dtype) -> None:
    """Slices of a fused projection, as in Megatron, and transposed outputs give bitwise identical results."""
    tensors = inputs(case, dtype)
    want = run_kernel(case, tensors)

    def sliced(x: Tensor) -> Tensor:
        wide = torch.full((x.shape[0], x.shape[2], x.shape[1], x.shape[3] + 9), float("nan"), dtype=x.dtype)
        view = wide[..., 4 : 4 + x.shape[3]].transpose(1, 2)
        return view.copy_(x)

    q, k, v, dout = (sliced(x) for x in tensors)
    out, lse = sliced(torch.zeros(want[0].shape)), torch.zeros(want[1].shape).mT.contiguous().mT
    options = {"mask": case.mask(), "softmax_scale": case.softmax_scale}
    KERNEL.forward(q, k, v, out, lse, accumulate=False, **options)
    gradients = [sliced(torch.zeros(x.shape)) for x in tensors[:3]]
    strided_delta = delta(out, dout).mT.contiguous().mT
    KERNEL.backward(dout, q, k, v, lse, strided_delta, *gradients, **options)
    for name, got, expected in zip(NAMES, (out, lse, *gradients), want, strict=True):
        assert torch.equal(got, expected), name


# Three kinds of ragged key ranges. A forward task has many row tiles with one thread, few with eight.
REPEATED = {
    "causal": Case(queries=1500, keys=2000, band_hi=500),
    "window": Case(queries=1500, keys=1500, band_lo=-300, band_hi=0),
    "documents": Case(queries=1500, keys=1700, ranges="documents"),
}


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("kind", REPEATED)
def test_repeatable_on_any_number_of_threads(kind: str, dtype: torch.dtype, heads: int) -> None:
    """One head is the hard case: its key chunks run concurrently and add to the same dQ."""
    case = replace(REPEATED[kind], heads=heads, groups=1, head_dim=32, value_dim=32)
    tensors = inputs(case, dtype)
    torch.set_num_threads(1)
    want = run_kernel(case, tensors)
    for count in (1, 2, 3, 8, 2):
        torch.set_num_threads(count)
        for name, got, expected in zip(NAMES, run_kernel(case, tensors), want, strict=True):
            assert torch.equal(got, expected), f"{name} differs on {count} threads"


@pytest.mark.parametrize("exponent", [-60, 60])
def test_digits_are_kept_at_any_size(exponent: int) -> None:
    """fp32 may be computed as several low-precision parts, but scaling by a power of two must stay exact."""
    q, k, v, dout = inputs(CAUSAL, torch.float32)
    _, lse, dq, dk, _ = run_kernel(CAUSAL, (q, k, v, dout))
    _, scaled_lse, *scaled = run_kernel(CAUSAL, (q, k, v * 2.0**exponent, dout))
    assert torch.equal(scaled_lse, lse)
    assert torch.equal(scaled[0], dq * 2.0**exponent)
    assert torch.equal(scaled[1], dk * 2.0**exponent)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_row(dtype: torch.dtype) -> None:
    """A NaN must not become a plausible number, and must not spread to other rows."""
    q, k, v, dout = inputs(CAUSAL, dtype)
    clean = run_kernel(CAUSAL, (q, k, v, dout))
    q[77, 0, 3, 5] = float("nan")
    out, lse, *_ = run_kernel(CAUSAL, (q, k, v, dout))
    assert out[77, 0, 3].isnan().all()
    assert lse[0, 3, 77].isnan()
    out[77, 0, 3], lse[0, 3, 77] = clean[0][77, 0, 3], clean[1][0, 3, 77]
    assert torch.equal(out, clean[0])
    assert torch.equal(lse, clean[1])


def test_ops_are_registered_as_torch_wants() -> None:
    case = Case(queries=9, keys=12, ranges="random")
    q, k, v, dout = inputs(case, torch.float32)
    out, lse, dq, dk, dv = run_kernel(case, (q, k, v, dout))
    ops, mask = torch.ops.mls, case.mask()
    band = (mask.band_lo, mask.band_hi, mask.key_ranges, 0.25)
    torch.library.opcheck(ops.attention_forward.default, (q, k, v, out, lse, *band, True))
    arguments = (dout, q, k, v, lse, lse * 0, dq, dk, dv, *band, True)
    torch.library.opcheck(ops.attention_backward.default, arguments)


def test_traces_into_one_graph() -> None:
    q, k, v, _ = inputs(CAUSAL, torch.float32)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = torch.empty(CAUSAL.queries, 1, 4, 24), torch.empty(1, 4, CAUSAL.queries)
        torch.ops.mls.attention_forward(q, k, v, out, lse, -500, 167, None, 0.1, False)
        return out

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v), attend(q, k, v))


def _forward_arguments() -> dict[str, Any]:
    return {
        "q": torch.zeros(6, 1, 4, 8),
        "k": torch.zeros(5, 1, 2, 8),
        "v": torch.zeros(5, 1, 2, 3),
        "out": torch.zeros(6, 1, 4, 3),
        "lse": torch.zeros(1, 4, 6),
        "key_ranges": torch.zeros(2, 6, dtype=torch.int32),
        "softmax_scale": 1.0,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(6, 4, 8)}, r"q has shape \(6, 4, 8\): it must have 4 dimensions \(Sq, B, H, D\)"),
        ({"k": torch.zeros(5, 1, 2, 9)}, r"k has shape \(5, 1, 2, 9\): .* \(Sk, B, G, D\) = \(5, 1, 2, 8\)"),
        ({"v": torch.zeros(4, 1, 2, 3)}, r"v has shape \(4, 1, 2, 3\): .* \(Sk, B, G, Dv\) = \(5, 1, 2, 3\)"),
        (
            {"q": torch.zeros(6, 1, 3, 8)},
            "q has 3 heads and k has 2: key/value heads must divide query heads",
        ),
        (
            {"q": torch.zeros(6, 1, 4, 0), "k": torch.zeros(5, 1, 2, 0)},
            "D = 0, Dv = 3: both must be at least 1",
        ),
        ({"q": torch.zeros(6, 1, 4, 8).half()}, "q is float16: the fused kernel takes float32 or bfloat16"),
        ({"k": torch.zeros(5, 1, 2, 8).bfloat16()}, "k is bfloat16: it must be float32, the dtype of q"),
        ({"q": torch.zeros(6, 1, 8, 4).mT}, "q has stride 4 in its last dimension: it must be contiguous"),
        ({"out": torch.zeros(6, 1, 4, 8)}, r"out has shape \(6, 1, 4, 8\): .* \(Sq, B, H, Dv\)"),
        (
            {"out": torch.zeros(6, 1, 4, 3).double()},
            "out is float64: it must be float32, the accumulator dtype",
        ),
        ({"lse": torch.zeros(1, 6, 4)}, r"lse has shape \(1, 6, 4\): it must be \(B, H, Sq\) = \(1, 4, 6\)"),
        ({"key_ranges": torch.zeros(2, 6)}, "key_ranges is float32: it must be int32"),
        (
            {"key_ranges": torch.zeros(6, 2, dtype=torch.int32)},
            r"key_ranges has shape \(6, 2\): .* \(2, Sq\)",
        ),
        ({"key_ranges": torch.zeros(6, 2, dtype=torch.int32).T}, "key_ranges is strided"),
        ({"softmax_scale": -0.5}, "softmax_scale is -0.5: it must be finite and above 0"),
        ({"softmax_scale": float("nan")}, "softmax_scale is nan"),
    ],
)
def test_forward_refuses(change: dict[str, Any], message: str) -> None:
    arguments = _forward_arguments() | change
    mask = TileMask(-9, 9, arguments.pop("key_ranges"))
    with pytest.raises(RuntimeError, match=message):
        KERNEL.forward(**arguments, mask=mask, accumulate=False)


def test_a_partial_output_is_not_rounded() -> None:
    arguments = {
        name: x.bfloat16() if name in ("q", "k", "v", "out") else x
        for name, x in _forward_arguments().items()
    }
    mask = TileMask(-9, 9, arguments.pop("key_ranges"))
    KERNEL.forward(**arguments, mask=mask, accumulate=False)
    with pytest.raises(RuntimeError, match="out is bfloat16: it must be float32, the accumulator dtype"):
        KERNEL.forward(**arguments, mask=mask, accumulate=True)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("dout", torch.zeros(6, 1, 4, 8), r"dout has shape \(6, 1, 4, 8\): .* \(Sq, B, H, Dv\)"),
        ("dout", torch.zeros(6, 1, 4, 3).bfloat16(), "dout is bfloat16: it must be float32, the dtype of q"),
        ("lse", torch.zeros(1, 4, 5), r"lse has shape \(1, 4, 5\)"),
        (
            "delta",
            torch.zeros(1, 4, 6).double(),
            "delta is float64: it must be float32, the accumulator dtype",
        ),
        ("dq", torch.zeros(6, 1, 4, 3), r"dq has shape \(6, 1, 4, 3\): it must be \(Sq, B, H, D\)"),
        ("dk", torch.zeros(5, 1, 4, 8), r"dk has shape \(5, 1, 4, 8\): it must be \(Sk, B, G, D\)"),
        ("dv", torch.zeros(5, 1, 2, 3).bfloat16(), "dv is bfloat16: it must be float32"),
        ("dv", torch.zeros(5, 1, 3, 2).mT, "dv has stride 2 in its last dimension"),
    ],
)
def test_backward_refuses(name: str, wrong: Tensor, message: str) -> None:
    arguments = _forward_arguments()
    q, k, v, lse = (arguments[key] for key in ("q", "k", "v", "lse"))
    tensors = {"dout": torch.zeros(6, 1, 4, 3), "q": q, "k": k, "v": v, "lse": lse, "delta": lse.clone()}
    tensors |= {"dq": torch.zeros(q.shape), "dk": torch.zeros(k.shape), "dv": torch.zeros(v.shape)}
    KERNEL.backward(**tensors, mask=TileMask(-9, 9), softmax_scale=1.0)
    with pytest.raises(RuntimeError, match=message):
        KERNEL.backward(**(tensors | {name: wrong}), mask=TileMask(-9, 9), softmax_scale=1.0)


def test_says_what_it_does_not_support() -> None:
    x = torch.zeros(1, 1, 1, 8)
    assert KERNEL.unsupported(x, x, x) is None
    assert KERNEL.unsupported(x.bfloat16(), x.bfloat16(), x.bfloat16()) is None
    assert KERNEL.unsupported(x.double(), x.double(), x.double()) == (
        "it takes float32 or bfloat16, not float64"
    )
    assert KERNEL.unsupported(x, x.bfloat16(), x) == (
        "it takes q, k and v of one dtype on one device, not float32 on cpu, bfloat16 on cpu, float32 on cpu"
    )
    assert KERNEL.unsupported(x.to("meta"), x, x) == "it takes tensors on the CPU only"


def test_missing_extension_names_the_build_command(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 1, 1, 8)
    monkeypatch.setitem(sys.modules, "megatron_lightseq._C", None)
    monkeypatch.setattr(extension, "_import_extension", extension._import_extension.__wrapped__)
    command = "python setup.py build_ext --inplace"
    reason = KERNEL.unsupported(x, x, x)
    assert reason is not None
    assert "have not been built" in reason
    assert command in reason
    with pytest.raises(UnsupportedError, match=f"have not been built.*`{command}`"):
        _ = KERNEL.isa
    options: dict[str, Any] = {"mask": TileMask(0, 0), "softmax_scale": 1.0}
    with pytest.raises(UnsupportedError, match=r"kernel 'cpu'.*kernel='reference'"):
        KERNEL.forward(x, x, x, x, x[0], accumulate=False, **options)
    with pytest.raises(UnsupportedError, match=r"kernel 'cuda'.*have not been built"):
        CudaKernel().forward(x, x, x, x, x[0], accumulate=False, **options)
    with pytest.raises(UnsupportedError, match=r"kernel 'cuda'.*have not been built"):
        CudaKernel().backward(x, x, x, x, x[0], x[0], x, x, x, **options)


def test_kernels_older_than_their_sources_are_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = source_hash(extension.SOURCES)
    assert extension.load_extension().source_hash == before
    shutil.copytree(extension.SOURCES, tmp_path / "csrc")
    assert source_hash(tmp_path / "csrc") == before
    (tmp_path / "csrc" / "bindings.cpp").write_bytes(
        extension.SOURCES.joinpath("bindings.cpp").read_bytes().replace(b"\n", b"\r\n")
    )
    assert source_hash(tmp_path / "csrc") == before, "a checkout on Windows"
    (tmp_path / "csrc" / "bindings.cpp").rename(tmp_path / "csrc" / "other.cpp")
    assert source_hash(tmp_path / "csrc") != before
    monkeypatch.setattr(extension, "SOURCES", tmp_path / "csrc")
    monkeypatch.setattr(extension, "_import_extension", extension._import_extension.__wrapped__)
    x = torch.zeros(1, 1, 1, 8)
    assert "built from other sources than those in csrc" in (KERNEL.unsupported(x, x, x) or "")
    assert "not used" in caplog.text


def test_unknown_variant_is_refused_by_name() -> None:
    code = "from megatron_lightseq.kernels.cpu import CpuKernel; CpuKernel().isa"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"MLS_CPU_ISA": "avx1024", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "MLS_CPU_ISA=avx1024: this build and machine have no such variant. Use one of:" in done.stderr
