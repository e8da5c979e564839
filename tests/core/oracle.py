"""Whole-sequence attention on one device, and how far from it a result may be."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lightseq.mask import Mask

NAMES = ("out", "dq", "dk", "dv")


def dense(mask: Mask, length: int) -> Tensor:
    """The (query, key) matrix of a mask as booleans, computed row by row and without tiles."""
    seen = torch.zeros(length, length, dtype=torch.bool)
    for query in range(length):
        for keys in mask.keys_of(query):
            seen[query, keys.start : keys.stop] = True
    return seen


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Textbook attention over (S, B, H, D) by torch's own softmax, in the inputs' dtype throughout."""
    shared = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(shared, 2) for x in (k, v))
    scores = torch.einsum("qbhd,kbhd->bhqk", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~dense(mask, q.shape[0]), float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhqk,kbhd->qbhd", weights, v)


def inputs(
    seq_length: int, heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype, seed: int = 0
) -> list[Tensor]:
    """q, k, v and dout, for two sequences."""
    generator = torch.Generator().manual_seed(seed)
    (h, g), (d, dv) = heads, dims
    shapes = [(seq_length, 2, h, d), (seq_length, 2, g, d), (seq_length, 2, g, dv), (seq_length, 2, h, dv)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def expected(whole: list[Tensor], mask: Mask, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """out, dq, dk, dv with all arithmetic in ``dtype``; returned in fp64."""
    q, k, v = (x.to(dtype).requires_grad_() for x in whole[:3])
    out = attention(q, k, v, mask)
    grads = torch.autograd.grad(out, (q, k, v), whole[3].to(dtype))
    return [x.detach().double() for x in (out, *grads)]


def check_within_budget(got: list[Tensor], whole: list[Tensor], mask: Mask, what: str) -> None:
    """Fail unless the error against fp64 is at most twice that of the same maths in the inputs' dtype.

    Applies to the largest and to the RMS error. NaN fails, because every comparison with it is false.
    """
    dtype = whole[0].dtype
    exact, naive = expected(whole, mask), expected(whole, mask, dtype)
    for name, result, want, low in zip(NAMES, got, exact, naive, strict=True):
        for measure in (torch.max, lambda x: x.square().mean().sqrt()):
            ours, theirs = (measure((x.double() - want).abs()).item() for x in (result, low))
            # The floor is for cases in which the other error happens to be tiny.
            floor = torch.finfo(torch.float32).eps * measure(want.abs()).item()
            assert ours <= 2 * theirs + floor, (
                f"{what} {name}: error {ours:.3e}, same maths in {dtype} {theirs:.3e}"
            )
