"""Adapters to external kernels: results on the CPU, the arguments they pass on, and what they refuse."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from megatron_lightseq.attention import dist_attention
from megatron_lightseq.config.typed import choices
from megatron_lightseq.errors import UnsupportedError
from megatron_lightseq.kernels import flash_attn
from megatron_lightseq.kernels.adapters import output_with_delta
from megatron_lightseq.kernels.flash_attn import FlashAttnKernel
from megatron_lightseq.kernels.reference import ReferenceKernel
from megatron_lightseq.kernels.registry import Kernel, resolve_kernel
from megatron_lightseq.kernels.sdpa import SdpaKernel
from megatron_lightseq.kernels.specs import kernel_names
from megatron_lightseq.kernels.tile_mask import TileMask
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.transport import run_loopback
from megatron_lightseq.transport.group import Group
from tests.core import oracle as attention_oracle
from tests.kernels.oracle import Case, delta, expect_within_budget, inputs, run_kernel

FULL = Case(queries=60, keys=90, batch=2, heads=4, groups=2, head_dim=32, value_dim=32)
SQUARE_CAUSAL = replace(FULL, keys=60, band_hi=0)


@pytest.mark.parametrize("kernel", [SdpaKernel(), FlashAttnKernel()], ids=lambda kernel: kernel.name)
def test_fulfils_the_protocol(kernel: Kernel) -> None:
    assert isinstance(kernel, Kernel)


@pytest.mark.parametrize("case", [FULL, SQUARE_CAUSAL], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sdpa_matches_fp64(case: Case, dtype: torch.dtype) -> None:
    tensors = inputs(case, dtype)
    results = run_kernel(case, tensors, SdpaKernel())
    if dtype == torch.float32:
        expect_within_budget(case, dtype, tensors, results)
    else:  # torch rounds out and the gradients to bfloat16
        exact = run_kernel(case, tuple(x.float() for x in tensors), ReferenceKernel())
        for got, want in zip(results, exact, strict=True):
            assert (got - want).norm() <= 2e-2 * want.norm()


def test_sdpa_accumulates_tiles() -> None:
    """Two ring steps of a causal rank: its own chunk, then a full earlier chunk. delta and lse cover both."""
    tensors = q, k, v, dout = inputs(replace(FULL, queries=45, keys=90, band_hi=45), torch.float32)
    case = replace(FULL, queries=45, keys=90, band_hi=45)
    out, lse = torch.full((45, 2, 4, 32), float("nan")), torch.full((2, 4, 45), float("nan"))
    tiles = ((slice(45, 90), TileMask(-100, 0)), (slice(0, 45), TileMask(-100, 100)))
    kernel, scale = SdpaKernel(), case.softmax_scale
    for part, mask in tiles:
        first = part.start == 45
        kernel.forward(q, k[part], v[part], out, lse, mask=mask, softmax_scale=scale, accumulate=not first)
    dq, dk, dv = (torch.zeros(x.shape) for x in (q, k, v))
    for part, mask in tiles:
        grads = delta(out, dout), dq, dk[part], dv[part]
        kernel.backward(dout, q, k[part], v[part], lse, *grads, mask=mask, softmax_scale=scale)
    expect_within_budget(case, torch.float32, tensors, (out, lse, dq, dk, dv))


def test_output_with_delta_has_that_delta() -> None:
    dout, want = torch.randn(7, 2, 3, 16), torch.randn(2, 3, 7)
    dout[0, 0, 0] = 0.0
    want[0, 0, 0] = 0.0
    torch.testing.assert_close(delta(output_with_delta(dout, want), dout), want)


@pytest.mark.parametrize("name", ["sdpa", "flash_attn"])
def test_packed_documents_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = {"sdpa": SdpaKernel(), "flash_attn": FlashAttnKernel()}[name]
    case = replace(FULL, ranges="documents")
    with pytest.raises(UnsupportedError, match=f"'{name}' for a tile with key_ranges"):
        run_kernel(case, inputs(case, torch.float32), kernel)


def test_sdpa_refuses_windows_and_unequal_chunks() -> None:
    for case in (replace(SQUARE_CAUSAL, band_lo=-5), replace(FULL, band_hi=0)):
        with pytest.raises(
            UnsupportedError, match="full tiles, and causal tiles with as many keys as queries"
        ):
            run_kernel(case, inputs(case, torch.float32), SdpaKernel())


def test_every_kernel_can_be_configured() -> None:
    assert choices("cp_kernel") == kernel_names()


def _attend(group: Group | None, method: str, layout: SequenceLayout, whole: list[Tensor]) -> list[Tensor]:
    rank = 0 if group is None else group.rank()
    q, k, v, dout = (layout.shard(x, rank, 0).clone() for x in whole)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = dist_attention(*leaves, group=group, layout=layout, method=method, kernel="sdpa")
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(
    ("method", "layout_name"),
    [
        *[("lightseq", "contiguous"), ("ring", "contiguous"), ("zigzag", "zigzag"), ("mesh", "zigzag")],
        *[("all_gather", "zigzag"), ("ulysses", "contiguous"), ("usp", "contiguous")],
    ],
)
def test_sdpa_serves_every_method_off_stripes(size: int, method: str, layout_name: str) -> None:
    """Every combination that the configuration rule `kernel_knows_striped_tiles` allows."""
    layout = SequenceLayout(layout_name, size)
    whole = attention_oracle.inputs(2 * size * 5, (4, 2), (8, 8), torch.float64)
    parts = run_loopback(size, lambda group: _attend(group, method, layout, whole))
    got = [layout.unshard(shards, 0) for shards in zip(*parts, strict=True)]
    for result, want in zip(got, attention_oracle.expected(whole, Mask.causal()), strict=True):
        torch.testing.assert_close(result, want, rtol=1e-9, atol=1e-9)


def test_sdpa_refuses_stripes_by_name() -> None:
    layout = SequenceLayout.striped(2)
    whole = attention_oracle.inputs(20, (4, 2), (8, 8), torch.float64)
    with pytest.raises(UnsupportedError, match="causal tiles with as many keys as queries"):
        run_loopback(2, lambda group: _attend(group, "ring", layout, whole))


def test_sdpa_is_chosen_by_name_only() -> None:
    q = torch.randn(4, 1, 2, 16)
    assert resolve_kernel("sdpa", q, q, q).name == "sdpa"
    assert resolve_kernel("auto", q, q, q).name in ("cpu", "reference")
    with pytest.raises(UnsupportedError, match="it takes head dims D = Dv, not 16:8"):
        resolve_kernel("sdpa", q, q, q[..., :8])


def test_empty_tiles_change_nothing() -> None:
    q, k, v, _ = inputs(FULL, torch.float32)
    out, lse = torch.randn(60, 2, 4, 32), torch.randn(2, 4, 60)
    before = out.clone(), lse.clone()
    for kernel in (SdpaKernel(), FlashAttnKernel()):
        kernel.forward(q, k, v, out, lse, mask=TileMask(500, 600), softmax_scale=1.0, accumulate=True)
        assert torch.equal(out, before[0])
        assert torch.equal(lse, before[1])


def test_flash_attn_is_refused_where_it_is_absent() -> None:
    q = torch.randn(4, 1, 2, 16)
    with pytest.raises(UnsupportedError, match="tensors on a CUDA device only"):
        resolve_kernel("flash_attn", q, q, q)
    with pytest.raises(UnsupportedError, match="flash-attn package cannot be imported here"):
        run_kernel(FULL, inputs(FULL, torch.float32), FlashAttnKernel())


def _reference_window(q: Tensor, k: Tensor, window_size_left: int, window_size_right: int) -> TileMask:
    diagonal = k.shape[1] - q.shape[1]
    lo = -(1 << 30) if window_size_left < 0 else diagonal - window_size_left
    return TileMask(lo, (1 << 30) if window_size_right < 0 else diagonal + window_size_right)


def _stand_in() -> ModuleType:
    """The interface of flash-attn 2.8, as documented, computed with our reference kernel."""
    module = ModuleType(flash_attn.INTERFACE)

    def forward(q: Tensor, k: Tensor, v: Tensor, **options: float) -> tuple[Tensor, Tensor, None, None]:
        out, lse = torch.empty_like(q), torch.empty(q.shape[0], q.shape[2], q.shape[1])
        mask = _reference_window(q, k, int(options["window_size_left"]), int(options["window_size_right"]))
        ReferenceKernel().forward(
            *(x.transpose(0, 1) for x in (q, k, v, out)),
            lse,
            mask=mask,
            softmax_scale=options["softmax_scale"],
            accumulate=False,
        )
        return out, lse.masked_fill(lse.isneginf(), float("inf")), None, None

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *rest: Tensor, **options: float
    ) -> None:
        lse, *grads = rest
        for grad in grads:
            grad.zero_()
        mask = _reference_window(q, k, int(options["window_size_left"]), int(options["window_size_right"]))
        sums = (out * dout).sum(-1).transpose(1, 2)
        ReferenceKernel().backward(
            *(x.transpose(0, 1) for x in (dout, q, k, v)),
            lse.masked_fill(lse.isposinf(), float("-inf")),
            sums,
            *(x.transpose(0, 1) for x in grads),
            mask=mask,
            softmax_scale=options["softmax_scale"],
        )

    module._flash_attn_forward, module._flash_attn_backward = forward, backward  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize(
    "case",
    [
        FULL,
        SQUARE_CAUSAL,
        replace(FULL, band_hi=30),
        replace(FULL, queries=90, keys=60, band_hi=-30),
        replace(SQUARE_CAUSAL, band_lo=-7, band_hi=4),
    ],
    ids=["full", "causal", "bottom-right", "with empty rows", "window"],
)
def test_flash_attn_gets_the_right_arguments(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, flash_attn.INTERFACE, _stand_in())
    flash_attn._probe.cache_clear()
    try:
        tensors = inputs(case, torch.float32)
        expect_within_budget(case, torch.float32, tensors, run_kernel(case, tensors, FlashAttnKernel()))
    finally:
        flash_attn._probe.cache_clear()


def test_flash_attn_refuses_windows_off_its_diagonal() -> None:
    case = replace(FULL, band_hi=10)
    with pytest.raises(UnsupportedError, match="windows must contain the diagonal"):
        run_kernel(case, inputs(case, torch.float32), FlashAttnKernel())
