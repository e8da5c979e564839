from __future__ import annotations

import pytest
import torch
from torch import Tensor

import megatron_lightseq as mls
from megatron_lightseq.kernels.reference import visible
from megatron_lightseq.kernels.registry import TileMask
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.transport import run_loopback


def oracle(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Whole-sequence attention (S, B, H, D) by torch's own softmax; nothing of the package but the mask."""
    tokens = range(q.shape[0])
    shared = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(shared, 2) for x in (k, v))
    scores = torch.einsum("qbhd,kbhd->bhqk", q, k) * q.shape[-1] ** -0.5
    seen = visible(TileMask.of(mask, tokens, tokens, q.device), len(tokens), len(tokens), q.device)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhqk,kbhd->qbhd", weights, v)


def whole_inputs(
    seq_length: int, heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seq_length)
    (h, g), (d, dv) = heads, dims
    shapes = [(seq_length, 2, h, d), (seq_length, 2, g, d), (seq_length, 2, g, dv), (seq_length, 2, h, dv)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def attend_shards(
    group, method: str, layout: SequenceLayout, mask: Mask, whole: list[Tensor], overlap: bool = True
):  # type: ignore[no-untyped-def]
    """One rank's outputs and gradients."""
    rank = 0 if group is None else group.rank()
    q, k, v, dout = (layout.shard(x, rank, 0).clone() for x in whole)
    for x in (q, k, v):
        x.requires_grad_()
    out = mls.dist_attention(q, k, v, group=group, layout=layout, method=method, mask=mask, overlap=overlap)
    out.backward(dout)
    return [out.detach(), q.grad, k.grad, v.grad]


def expected(whole: list[Tensor], mask: Mask) -> list[Tensor]:
    q, k, v = (x.double().requires_grad_() for x in whole[:3])
    out = oracle(q, k, v, mask)
    out.backward(whole[3].double())
    return [out.detach(), q.grad, k.grad, v.grad]  # type: ignore[list-item]


CASES = [("lightseq", "contiguous"), ("ring", "contiguous"), ("ring", "striped"), ("zigzag", "zigzag")]
MASKS = ["causal", "full", "window(5,0)", "window(3,4)", "documents", "causal&documents"]


def mask_for(text: str, seq_length: int) -> Mask:
    borders = sorted({0, 1, seq_length // 3, seq_length // 3 + 1, seq_length - 2, seq_length})
    return Mask.parse(text.replace("documents", f"documents({','.join(map(str, borders))})"))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize(("method", "layout_name"), CASES)
def test_loopback_equals_one_device_in_fp64(size: int, method: str, layout_name: str) -> None:
    layout = SequenceLayout(layout_name, size)
    seq_length = 2 * size * 7
    for index, text in enumerate(MASKS):
        heads = [(1, 1), (4, 1), (4, 2), (4, 4), (6, 3), (3, 3)][index]
        mask = mask_for(text, seq_length)
        whole = whole_inputs(seq_length, heads, (8, 8 if index % 2 else 5), torch.float64)
        parts = run_loopback(size, lambda group: attend_shards(group, method, layout, mask, whole))  # noqa: B023
        for name, want, *got in zip(["out", "dq", "dk", "dv"], expected(whole, mask), *parts, strict=True):
            error = (layout.unshard(got, 0) - want).abs().max().item()
            assert error <= 1e-12, (method, size, text, name, error)
