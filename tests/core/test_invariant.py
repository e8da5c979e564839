"""Attention whose bits do not depend on the number of ranks, the layout or the method."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from itertools import product

import pytest
import torch
from torch import Tensor

from megatron_lightseq import Mask, SequenceLayout, dist_attention
from megatron_lightseq.attention import DistAttention
from megatron_lightseq.errors import ConfigError, LayoutError, UnsupportedError
from megatron_lightseq.kernels.cpu import CpuKernel
from megatron_lightseq.kernels.merge import merge_into
from megatron_lightseq.schedule.joins import Forest, Node, nodes_of
from megatron_lightseq.transport import run_loopback
from megatron_lightseq.transport.group import Group
from tests.core import oracle
from tests.core.test_batch_rows import expected as expected_of_rows

needs_cpu_kernel = pytest.mark.skipif(
    CpuKernel().unsupported(*[torch.zeros(1, 1, 1, 1)] * 3) is not None,
    reason="the compiled kernels are not built",
)
Masks = Mask | Sequence[Mask]

LENGTH, CHUNK = 256, 16
WAYS = [
    ("lightseq", "contiguous"),
    ("ring", "contiguous"),
    ("balanced", "contiguous"),
    ("all_gather", "contiguous"),
    ("mesh", "zigzag"),
    ("zigzag", "zigzag"),
    ("usp:2", "contiguous"),
    ("usp:2", "zigzag"),
]
KINDS = ["causal", "documents", "two terms", "padding", "rows"]


def masks_of(kind: str, length: int) -> Masks:
    if kind == "causal":
        return Mask.causal()
    if kind == "two terms":
        return (Mask.window(40) | Mask.sinks(3)) & Mask.causal()
    third, half = length // 3, length // 2 + 1
    if kind == "documents":
        return Mask.documents((0, 7, third, half, half + 1, length - 9, length))
    if kind == "padding":
        return Mask.padded((0, third, half, length), (third // 2, half - third, 50))
    return (Mask.documents((0, half, length)), Mask.window(70))


def run(
    size: int,
    method: str,
    layout_name: str,
    masks: Masks,
    whole: list[Tensor],
    chunk: int | None,
    **more: str,
) -> tuple[list[Tensor], int]:
    """out, dq, dk, dv of the whole sequence; and the bytes that all ranks received."""
    layout = SequenceLayout(layout_name, size)

    def one_rank(group: Group) -> tuple[list[Tensor], int]:
        attention = DistAttention(group, layout=layout, method=method, invariant_chunk=chunk, **more)
        q, k, v, dout = (layout.shard(x, group.rank(), 0).clone() for x in whole)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, mask=masks)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)], attention.stats.bytes_received

    parts = run_loopback(size, one_rank)
    tensors = [layout.unshard([results[i] for results, _ in parts], 0) for i in range(4)]
    return tensors, sum(received for _, received in parts)


@needs_cpu_kernel
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_ranks_or_methods(kind: str, dtype: torch.dtype) -> None:
    """For 2, 4 and 8 ranks, and for 3 and 6, which are no powers of two, everything is as on one."""
    for length, sizes in ((LENGTH, (1, 2, 4, 8)), (192, (3, 6))):
        whole, masks = oracle.inputs(length, (4, 2), (24, 16), dtype), masks_of(kind, length)
        one, _ = run(1, "lightseq", "contiguous", masks, whole, CHUNK)
        for size, (method, layout_name) in product(sizes, WAYS):
            if method.startswith("usp") and size % 2:
                continue
            got, _ = run(size, method, layout_name, masks, whole, CHUNK)
            for name, result, want in zip(oracle.NAMES, got, one, strict=True):
                assert torch.equal(result, want), f"{kind} {method} on {size} ranks: {name} differs"


@needs_cpu_kernel
def test_the_usual_order_of_sums_does_depend_on_ranks() -> None:
    """Otherwise the test above would show nothing."""
    whole = oracle.inputs(LENGTH, (4, 2), (24, 16), torch.float32)
    one, _ = run(1, "lightseq", "contiguous", Mask.causal(), whole, None)
    two, _ = run(2, "lightseq", "contiguous", Mask.causal(), whole, None)
    assert not any(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_exact(kind: str) -> None:
    whole = oracle.inputs(192, (4, 2), (6, 5), torch.float64)
    masks = masks_of(kind, 192)
    rows = (masks,) * 2 if isinstance(masks, Mask) else tuple(masks)
    for method, layout_name in WAYS[:6]:
        got, _ = run(3, method, layout_name, masks, whole, CHUNK, kernel="reference")
        for name, result, want in zip(oracle.NAMES, got, expected_of_rows(whole, rows), strict=True):
            assert (result - want).abs().max() <= 1e-12, (kind, method, name)


@needs_cpu_kernel
@pytest.mark.parametrize("method", ["lightseq", "ring"])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_powers_of_two_move_as_many_bytes_as_without(method: str, size: int) -> None:
    whole = oracle.inputs(LENGTH, (4, 2), (8, 8), torch.float32)
    _, fixed = run(size, method, "contiguous", Mask.causal(), whole, LENGTH // 16)
    _, usual = run(size, method, "contiguous", Mask.causal(), whole, None)
    assert fixed == usual


@pytest.mark.parametrize(
    ("method", "layout", "chunk", "kernel", "error", "text"),
    [
        ("lightseq", "contiguous", 16, "auto", LayoutError, "in parts of 24"),
        ("lightseq", "contiguous", 48, "auto", LayoutError, "Choose a chunk that divides 24"),
        ("ring", "striped", 16, "auto", LayoutError, "Choose the contiguous or the zigzag layout"),
        ("balanced", "contiguous", 20, "auto", LayoutError, "Choose a chunk that divides 48"),
        ("rsa", "contiguous", 16, "auto", UnsupportedError, "full rows of scores"),
        ("ulysses", "contiguous", 16, "auto", UnsupportedError, "divides 1 key/value heads among 2 ranks"),
        ("ring", "contiguous", 16, "sdpa", UnsupportedError, "kernel sdpa is not known to repeat"),
        ("auto", "contiguous", 16, "auto", ConfigError, "invariant_chunk=16 with method auto"),
        ("ring", "contiguous", 0, "auto", ConfigError, "invariant_chunk=0"),
    ],
)
def test_what_cannot_be_invariant_is_refused(
    method: str, layout: str, chunk: int, kernel: str, error: type[Exception], text: str
) -> None:
    def one_rank(group: Group) -> None:
        q, k = torch.randn(48, 1, 2, 8), torch.randn(48, 1, 1, 8)
        dist_attention(
            q, k, k, group=group, method=method, layout=layout, invariant_chunk=chunk, kernel=kernel
        )

    with pytest.raises(error, match=re.escape(text)):
        run_loopback(2, one_rank)


# --- the tree ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_the_shape_of_the_tree_is_that_of_the_leaves(seed: int) -> None:
    """Whoever computes which leaf, and in whatever order the nodes arrive."""
    rng = random.Random(seed)
    leaves = sorted(rng.sample(range(24), rng.randrange(1, 24)))

    def joined(computed: Sequence[int]) -> Forest[str]:
        forest: Forest[str] = Forest(leaves, lambda left, right: f"({left}{right})")
        for leaf in computed:
            forest.add(Node(leaf), f"{leaf} ")
        return forest

    ((_, want),) = joined(leaves).take()
    for ranks in (2, 3, 7):
        owner = [rng.randrange(ranks) for _ in leaves]
        parts = []
        for rank in range(ranks):
            computed = [leaf for leaf, of in zip(leaves, owner, strict=True) if of == rank]
            rng.shuffle(computed)
            nodes = joined(computed).take()
            assert tuple(node for node, _ in nodes) == nodes_of(computed, leaves)
            parts += nodes
        rng.shuffle(parts)
        whole: Forest[str] = Forest(leaves, lambda left, right: f"({left}{right})")
        for node, value in parts:
            whole.add(node, value)
        assert [value for _, value in whole.take()] == [want]


def test_halves_are_joined_left_before_right_at_aligned_places() -> None:
    forest: Forest[str] = Forest(range(6), lambda left, right: f"({left}{right})")
    for leaf in (5, 0, 4, 2, 3, 1):
        forest.add(Node(leaf), str(leaf))
    assert [value for _, value in forest.take()] == ["(((01)(23))(45))"]
    assert nodes_of([1, 2, 3], range(6)) == (Node(1), Node(2, 2))
    assert nodes_of([4, 5], range(6)) == (Node(4, 4),)  # 6 and 7 do not exist


# --- the merge ---------------------------------------------------------------------------------------------


def partial(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(7, 2, 3, 19, generator=generator), 3 * torch.randn(2, 3, 7, generator=generator)


@needs_cpu_kernel
def test_the_fused_merge_is_the_merge() -> None:
    for threads in (1, 2):
        torch.set_num_threads(threads)
        (out, lse), (other, other_lse) = partial(0), partial(1)
        exact = [x.double() for x in (out, lse, other, other_lse)]
        merge_into(out, lse, other, other_lse)
        merge_into(*exact)
        assert (out - exact[0]).abs().max() <= 1e-6
        assert (lse - exact[1]).abs().max() <= 1e-6
    torch.set_num_threads(1)


@needs_cpu_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_have_seen_nothing_change_no_bit(dtype: torch.dtype) -> None:
    out, lse = (x.to(dtype) for x in partial(0))
    nothing, never = torch.zeros_like(out), torch.full_like(lse, float("-inf"))
    for mine, theirs in (((out, lse), (nothing, never)), ((nothing, never), (out, lse))):
        a, b = mine[0].clone(), mine[1].clone()
        merge_into(a, b, *theirs)
        assert torch.equal(a, out)
        assert torch.equal(b, lse)
    a, b = nothing.clone(), never.clone()
    merge_into(a, b, nothing, never)
    assert (a == 0).all()
    assert b.isneginf().all()


@needs_cpu_kernel
def test_the_merge_refuses_tensors_that_do_not_fit() -> None:
    (out, lse), (other, other_lse) = partial(0), partial(1)
    with pytest.raises(RuntimeError, match=r"other_lse has shape \(2, 3, 6\): it must be \(B, H, Sq\)"):
        merge_into(out, lse, other, other_lse[..., :6])
    with pytest.raises(RuntimeError, match=r"other_out has shape \(6, 2, 3, 19\)"):
        merge_into(out, lse, other[:6], other_lse)


@needs_cpu_kernel
def test_what_is_not_finite_stays_visible() -> None:
    for value in (float("nan"), float("inf")):
        for side in (0, 1):
            parts = [partial(0), partial(1)]
            parts[side][1][1, 2, 3] = value
            (out, lse), (other, other_lse) = parts
            want = torch.logaddexp(lse, other_lse)
            merge_into(out, lse, other, other_lse)
            torch.testing.assert_close(lse, want, equal_nan=True)
