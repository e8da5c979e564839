"""Every kind of mask through every method, on one to five ranks: equal to attention over the whole sequence."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_lightseq.attention import DistAttention
from megatron_lightseq.kernels.cpu import CpuKernel
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Line, Mask
from megatron_lightseq.transport import run_loopback
from megatron_lightseq.transport.group import Group
from tests.core import oracle
from tests.core.mask_kinds import combined
from tests.core.test_attention import EVERY, attend, check_exact, unshard

needs_cpu_kernel = pytest.mark.skipif(
    CpuKernel().unsupported(*[torch.zeros(1, 1, 1, 1)] * 3) is not None,
    reason="the compiled kernels are not built",
)
FEW_ROUNDINGS = 32 * torch.finfo(torch.float32).eps


def kinds(length: int) -> Iterator[Mask]:
    """One mask of each kind, with borders at awkward places: single tokens, empty documents, the end."""
    third = length // 3
    borders = sorted({0, 1, third, third + 1, length - 2, length})
    parts = [max(0, end - first - 2) for first, end in pairwise(borders)]
    packed = Mask.documents(borders)
    question = length // 4
    yield packed & Mask.window(3)
    yield Mask.documents([0, *borders], causal=False) & Mask.window(2, 1)
    yield Mask.chunked(max(2, length // 4))
    yield Mask.chunked(4) & packed
    yield Mask.prefix((0, length), (third,))
    yield Mask.prefix(borders, parts)
    yield Mask.padded(borders, parts)
    yield Mask.padded((0, length), (third,), causal=False)
    yield Mask.window(3) | Mask.sinks(2)
    yield Mask.global_tokens(2) | Mask.window(2, 2)
    yield Mask.shared_question([(question, 2, length - question - 4), (1, 1)])
    yield Mask.sinks(2, causal=False)  # only tiles with the first keys have work
    yield Mask.runs([(0, 0, 0), (1, Line(-3, moving=True), Line(-1, moving=True))])  # not its own key
    yield Mask.sinks(0)  # no query sees any key


def run(
    size: int, method: str, layout: SequenceLayout, mask: Mask, whole: list[Tensor], kernel: str
) -> list[Tensor]:
    parts = run_loopback(size, lambda group: attend(group, method, layout, mask, whole, kernel=kernel))
    return unshard(layout, parts)


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(("method", "layout_name"), EVERY)
def test_every_kind_is_exact_in_fp64(size: int, method: str, layout_name: str) -> None:
    layout, length = SequenceLayout(layout_name, size), max(2 * size * 3, 8)
    whole = oracle.inputs(length, (4, 2), (5, 3), torch.float64)
    masks = list(kinds(length))
    for mask in masks if size <= 5 else masks[size % 5 :: 5]:
        got = run(size, method, layout, mask, whole, "reference")
        check_exact(got, whole, mask, mask)


WITHOUT_WORK = [
    (4, 72, "window(2,2)|globals(2)"),
    (
        5,
        30,
        "runs(30;0:0..p+1,9:0..4,22:22..p+1,23:23..p+1,28:28..p+1)|"
        "runs(30;0:none,9:7..p+1,12:12..p+1,20:p..p+1,22:none)",
    ),
    (
        4,
        16,
        "runs(16;0:0..2,2:2..4,3:0..16,5:0..p+1,6:p-5..p+1,7:p-5..4,9:7..p+1,11:11..p+1,13:13..p+1)|"
        "runs(16;0:none,7:7..p+1,9:none)",
    ),
]
"""Rectangles in which some key chunks have no work. Their part of dk and dv is sent anyway, and must be zero."""


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize(("size", "length", "text"), WITHOUT_WORK)
def test_chunks_without_work_in_a_rectangle_have_no_gradient(size: int, length: int, text: str) -> None:
    layout, mask = SequenceLayout.contiguous(size), Mask.parse(text)
    whole = oracle.inputs(length, (2, 1), (4, 3), torch.float64)
    check_exact(run(size, "balanced", layout, mask, whole, "reference"), whole, mask, mask)


@given(st.data(), st.sampled_from(EVERY), st.integers(2, 5), st.integers(1, 6))
def test_any_mask_by_any_method(data: st.DataObject, case: tuple[str, str], size: int, scale: int) -> None:
    (method, layout_name), length = case, 2 * size * scale
    mask, _ = data.draw(combined(length))
    whole = oracle.inputs(length, (2, 1), (4, 3), torch.float64)
    got = run(size, method, SequenceLayout(layout_name, size), mask, whole, "reference")
    check_exact(got, whole, mask, (method, mask))


@needs_cpu_kernel
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("method", "layout_name"), [case for case in EVERY if case[0] != "rsa"])
def test_every_kind_is_as_exact_as_fp32_allows(size: int, method: str, layout_name: str) -> None:
    layout, length = SequenceLayout(layout_name, size), 2 * size * 9
    whole = oracle.inputs(length, (4, 2), (16, 16), torch.float32)
    for mask in kinds(length):
        got = run(size, method, layout, mask, whole, "cpu")
        for name, result, want in zip(oracle.NAMES, got, oracle.expected(whole, mask), strict=True):
            error, scale = (result - want).abs().max().item(), max(1.0, want.abs().max().item())
            assert error <= FEW_ROUNDINGS * scale, f"{mask} {name}: {error:.2e}"


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
@pytest.mark.parametrize(("method", "layout_name"), [case for case in EVERY if case[0] != "rsa"])
def test_a_query_that_sees_nothing_has_output_0_and_lse_minus_infinity(
    method: str, layout_name: str, kernel: str
) -> None:
    size, length = 3, 24
    layout, mask = SequenceLayout(layout_name, size), Mask.padded((0, 7, 9, 24), (5, 0, 12))
    whole = oracle.inputs(length, (4, 2), (8, 8), torch.float32)
    blind = ~oracle.dense(mask, length).any(1)
    unseen = ~oracle.dense(mask, length).any(0)

    def one_rank(group: Group) -> list[Tensor]:
        q, k, v, dout = (layout.shard(x, group.rank(), 0).clone().requires_grad_() for x in whole)
        attention = DistAttention(group, layout=layout, method=method, mask=mask, kernel=kernel)
        out, lse = attention.forward_with_lse(q, k, v)
        grads = torch.autograd.grad(out, (q, k, v), dout.detach())
        return [out.detach(), lse.permute(2, 0, 1).contiguous(), *grads]

    out, lse, dq, dk, dv = unshard(layout, run_loopback(size, one_rank))
    assert blind.sum() == 7
    assert torch.equal(lse.isneginf(), blind[:, None, None].expand_as(lse))
    for result, empty in ((out, blind), (dq, blind), (dk, unseen), (dv, unseen)):
        assert (result[empty] == 0).all()
        assert (result[~empty] != 0).any((1, 2, 3)).all()


@needs_cpu_kernel
def test_parts_of_a_tile_are_added_in_fp32() -> None:
    """A tile may take several calls. The first one must not round its result, even if no other tile follows."""
    layout, mask = SequenceLayout.contiguous(1), Mask.window(3) | Mask.sinks(2)
    whole = oracle.inputs(40, (4, 2), (16, 16), torch.bfloat16)
    oracle.check_within_budget(run(1, "lightseq", layout, mask, whole, "cpu"), whole, mask, str(mask))


def test_auto_weighs_the_work_of_any_mask() -> None:
    layout, length = SequenceLayout.zigzag(3), 36
    whole = oracle.inputs(length, (4, 2), (5, 3), torch.float64)
    for mask in kinds(length):
        check_exact(run(3, "auto", layout, mask, whole, "reference"), whole, mask, mask)
