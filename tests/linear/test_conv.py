from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import megatron_lightseq as mls
from megatron_lightseq.errors import ConfigError, LayoutError, TransportError, UnsupportedError
from megatron_lightseq.mask import Mask
from megatron_lightseq.transport import run_loopback

TOKENS = 24


def expected(x: Tensor, weight: Tensor, bias: Tensor | None, borders: list[int]) -> Tensor:
    """torch's convolution of each document."""
    width = weight.shape[1]
    documents = [x[a:b].permute(1, 2, 0) for a, b in pairwise(borders)]
    outs = [F.conv1d(F.pad(d, (width - 1, 0)), weight[:, None], bias, groups=len(weight)) for d in documents]
    return F.silu(torch.cat(outs, 2)).permute(2, 0, 1)


def tensors(width: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    source = torch.Generator().manual_seed(width)
    shapes = ((TOKENS, 2, 3), (3, width), (3,), (TOKENS, 2, 3))
    return [torch.randn(*shape, generator=source, dtype=torch.float64).to(dtype) for shape in shapes]


def convolved(size: int, given: list[Tensor], mask: Mask) -> list[Tensor]:
    """Whole output and gradients, those of the weights summed over ranks."""
    layout = mls.SequenceLayout.contiguous(size)

    def one(group: Any) -> list[Tensor]:
        x, dout = (layout.shard(given[i], group.rank(), 0) for i in (0, 3))
        leaves = [t.clone().requires_grad_() for t in (x, given[1], given[2])]
        out = mls.dist_causal_conv1d(*leaves, group=group, mask=mask, activation="silu")
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    outs, dxs, dweights, dbiases = zip(*run_loopback(size, one), strict=True)
    return [
        layout.unshard(outs, 0),
        layout.unshard(dxs, 0),
        torch.stack(dweights).sum(0),
        torch.stack(dbiases).sum(0),
    ]


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("borders", [[0, TOKENS], [0, 1, 2, 10, 11, TOKENS]])
def test_every_number_of_ranks_equals_one_convolution(width: int, borders: list[int]) -> None:
    given = tensors(width)
    leaves = [t.clone().requires_grad_() for t in given[:3]]
    want = expected(leaves[0], leaves[1], leaves[2], borders)
    wanted = [want.detach(), *torch.autograd.grad(want, leaves, given[3])]
    for size in (1, 2, 3, 4, 6, 8):
        for got, exact in zip(convolved(size, given, Mask.documents(borders)), wanted, strict=True):
            torch.testing.assert_close(got, exact, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_the_number_of_ranks(dtype: torch.dtype) -> None:
    given = tensors(4, dtype)
    mask = Mask.documents([0, 5, 11, TOKENS])
    one = convolved(1, given, mask)[:2]
    for size in (2, 3, 4, 6, 8):
        assert all(map(torch.equal, convolved(size, given, mask)[:2], one))


def test_weights_of_torch_modules_are_taken_as_they_are() -> None:
    x, weight, bias, _ = tensors(4)
    assert torch.equal(
        mls.dist_causal_conv1d(x, weight[:, None], bias), mls.dist_causal_conv1d(x, weight, bias)
    )


def test_what_does_not_fit_is_refused() -> None:
    x, weight, bias, _ = tensors(4)
    with pytest.raises(ConfigError, match="a row of weights"):
        mls.dist_causal_conv1d(x, weight[:2], bias)
    with pytest.raises(ConfigError, match="a row of weights"):
        mls.dist_causal_conv1d(x, weight, bias[:2])
    with pytest.raises(ConfigError, match="silu or swish"):
        mls.dist_causal_conv1d(x, weight, bias, activation="gelu")
    with pytest.raises(UnsupportedError, match="causal documents"):
        mls.dist_causal_conv1d(x, weight, bias, mask=Mask.full())

    def short(group: Any) -> None:
        with pytest.raises(LayoutError, match="one other rank at most"):
            mls.dist_causal_conv1d(x[:2], weight, bias, group=group)

    def apart(group: Any) -> None:
        with pytest.raises(TransportError, match="plan something else"):
            mls.dist_causal_conv1d(x, weight[:, group.rank() :], bias, group=group)

    run_loopback(3, short)
    run_loopback(2, apart)
