"""A learned softmax scale, inputs under autocast, and documents that do not affect each other with any method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import megatron_lightseq as mls
from megatron_lightseq.attention import DistAttention
from megatron_lightseq.attention.distributed import MAX_SCALES
from megatron_lightseq.errors import ConfigError, UnsupportedError
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.transport import run_loopback
from megatron_lightseq.transport.group import Group
from tests.core import oracle

METHODS = [
    *[("lightseq", "contiguous"), ("ring", "striped"), ("zigzag", "zigzag"), ("all_gather", "zigzag")],
    *[("mesh", "zigzag"), ("ulysses", "contiguous"), ("usp", "contiguous"), ("rsa", "contiguous")],
]
every_method = pytest.mark.parametrize(("method", "layout_name"), METHODS)


def _scaled(whole: list[Tensor], scale: Tensor) -> Tensor:
    """Textbook attention with scaled scores, which the oracle itself does not support."""
    q, k, v = whole[:3]
    return oracle.attention(q * (scale * q.shape[-1] ** 0.5), k, v, Mask.causal())


def _learn(
    group: Group | None, method: str, layout: SequenceLayout, whole: list[Tensor], start: float
) -> Tensor:
    rank = 0 if group is None else group.rank()
    q, k, v, dout = (layout.shard(x, rank, 0) for x in whole)
    scale = torch.tensor([start], dtype=torch.float64, requires_grad=True)
    out = mls.dist_attention(q, k, v, group=group, layout=layout, method=method, softmax_scale=scale)
    (gradient,) = torch.autograd.grad(out, scale, dout)
    return gradient


@every_method
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_learned_scale_gets_its_gradient(method: str, layout_name: str, size: int) -> None:
    layout = SequenceLayout(layout_name, size)
    whole = oracle.inputs(size * 8, (6, 3), (8, 5), torch.float64)
    want = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(_scaled(whole, want), want, whole[3])
    parts = run_loopback(size, lambda group: _learn(group, method, layout, whole, 0.3))
    torch.testing.assert_close(sum(parts), expected, rtol=1e-10, atol=1e-10)


def test_the_scale_of_a_kept_result_with_a_sink_is_learned() -> None:
    whole = oracle.inputs(12, (4, 2), (8, 8), torch.float64)
    q, k, v, dout = whole
    sink = torch.randn(4, dtype=torch.float64)
    scale = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    attention = DistAttention()
    out, lse = attention.forward_with_lse(q, k, v, scale, sink)
    (gradient,) = torch.autograd.grad(out, scale, dout)
    kept = attention.reattach(q, k, v, (out.detach(), lse), scale, sink)
    assert torch.equal(torch.autograd.grad(kept, scale, dout)[0], gradient)
    step = 1e-6
    above, below = ((attention(q, k, v, 0.4 + d, sink) * dout).sum() for d in (step, -step))
    torch.testing.assert_close(gradient, (above - below) / (2 * step), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_learned_scale_in_low_precision(dtype: torch.dtype) -> None:
    whole = [x.to(dtype) for x in oracle.inputs(200, (4, 2), (32, 32), torch.float64)]
    scale = torch.tensor(0.2, requires_grad=True)
    out = mls.dist_attention(*whole[:3], softmax_scale=scale)
    out.backward(whole[3])
    want = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    _scaled([x.double() for x in whole], want).backward(whole[3].double())
    assert scale.grad is not None
    assert want.grad is not None
    assert (scale.grad.shape, scale.grad.dtype) == (scale.shape, scale.dtype)
    torch.testing.assert_close(
        scale.grad.double(), want.grad, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=0
    )


def test_a_scale_is_one_number() -> None:
    q = torch.randn(4, 1, 2, 8)
    with pytest.raises(
        ConfigError, match=r"softmax_scale of shape \(2,\): all scores are multiplied by one number"
    ):
        mls.dist_attention(q, q, q, softmax_scale=torch.ones(2))
    fixed = mls.dist_attention(q, q, q, softmax_scale=torch.tensor(0.3))
    assert torch.equal(fixed, mls.dist_attention(q, q, q, softmax_scale=float(torch.tensor(0.3))))


def test_learned_scales_are_not_remembered_without_bound() -> None:
    attention, q = DistAttention(), torch.randn(2, 1, 1, 8)
    for step in range(3 * MAX_SCALES):
        attention(q, q, q, 1.0 + step / 1024)
        assert len(attention._scales) <= MAX_SCALES


CASTS: list[tuple[torch.dtype, torch.dtype, torch.dtype]] = [
    (torch.float32, torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float32, torch.float32, torch.float32),
    (torch.float16, torch.bfloat16, torch.float32),
]


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtypes", CASTS, ids=str)
def test_autocast_is_that_of_torch(dtypes: tuple[torch.dtype, ...], target: torch.dtype) -> None:
    whole = oracle.inputs(24, (2, 2), (16, 16), torch.float64)
    leaves = [x.to(dtype).requires_grad_() for x, dtype in zip(whole, dtypes, strict=False)]
    with torch.autocast("cpu", dtype=target):
        out = mls.dist_attention(*leaves)
        by_head = [x.permute(1, 2, 0, 3) for x in leaves]
        torchs = F.scaled_dot_product_attention(*by_head, is_causal=True).permute(2, 0, 1, 3)
    assert out.dtype == torchs.dtype == target
    torch.testing.assert_close(out, torchs, rtol=2e-2, atol=2e-2)
    gradients = torch.autograd.grad(out.float().square().sum(), leaves)
    assert tuple(x.dtype for x in gradients) == dtypes


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
def test_autocast_does_not_reach_into_kernels(kernel: str) -> None:
    """fp64 is not cast, and plain torch inside a kernel computes in the precision that the kernel chose."""
    dtype = torch.float64 if kernel == "reference" else torch.bfloat16
    leaves = [x.requires_grad_() for x in oracle.inputs(24, (2, 2), (16, 16), dtype)[:3]]

    def run() -> list[Tensor]:
        out = mls.dist_attention(*leaves, kernel=kernel)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    plain = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for got, want in zip(run(), plain, strict=True):
            assert torch.equal(got, want)


def test_mixed_dtypes_are_refused_without_autocast() -> None:
    q = torch.randn(4, 1, 2, 8)
    with pytest.raises(ConfigError, match="q, k and v have one dtype"):
        mls.dist_attention(q, q, q.bfloat16())


PADDED, REAL = 48, 42


def _with_padding(group: Group, method: str, layout: SequenceLayout, whole: list[Tensor]) -> list[Tensor]:
    shards = [layout.shard(x, group.rank(), 0).clone() for x in whole]
    leaves = [x.requires_grad_() for x in shards[:3]]
    options: dict[str, Any] = {"layout": layout, "method": method, "mask": Mask.documents((0, REAL, PADDED))}
    out = mls.dist_attention(*leaves, group=group, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, shards[3])]


@every_method
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_padding_does_not_reach_the_document(method: str, layout_name: str, value: float) -> None:
    """Whatever values the padding holds, in the inputs and in the gradient of the output."""
    layout = SequenceLayout(layout_name, 3)
    whole = oracle.inputs(PADDED, (6, 3), (8, 8), torch.float64)
    results = []
    for padding in (1.0, value):
        for x in whole:
            x[REAL:] = padding
        parts = run_loopback(3, lambda group: _with_padding(group, method, layout, whole))
        results.append([layout.unshard(list(shards), 0)[:REAL] for shards in zip(*parts, strict=True)])
    for name, got, want in zip(oracle.NAMES, results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, msg=name)


def test_tensors_that_kernels_cannot_read_are_refused(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    x = torch.randn(8, 1, 2, 4)
    kinds: dict[str, Any] = {
        "a nested tensor.*Mask.documents": torch.nested.nested_tensor([x[:, 0], x[:4, 0]]),
        r"a tensor of layout torch.sparse_coo.*\.to_dense\(\)": x.to_sparse(),
        "a meta tensor, which has no values": x.to("meta"),
    }
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        kinds[r"a DTensor.*\.to_local\(\)"] = DTensor.from_local(x, mesh, [Replicate()])
        for message, other in kinds.items():
            with pytest.raises(UnsupportedError, match=f"q: {message}"):
                mls.dist_attention(other, x, x)
            with pytest.raises(UnsupportedError, match=f"v: {message}"):
                mls.dist_attention(x, x, other)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("mask", [torch.ones(8, 8, dtype=torch.bool), 3])
def test_a_mask_that_is_none_is_refused(mask: Any) -> None:
    x = torch.randn(8, 1, 2, 4)
    with pytest.raises(ConfigError, match=r"mask= a (Tensor of shape \(8, 8\)|int): .*mask_from_dense"):
        mls.dist_attention(x, x, x, mask=mask)
