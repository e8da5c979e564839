from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import megatron_lightseq as mls
from megatron_lightseq.errors import ConfigError, LayoutError, TransportError, UnsupportedError
from megatron_lightseq.kernels.linear.chunked import TorchLinearKernel
from megatron_lightseq.kernels.linear.contract import Part
from megatron_lightseq.linear import DistLinearAttention
from megatron_lightseq.linear.grid import grid_piece, parts_of
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule import Direction
from megatron_lightseq.schedule.scan_choose import StateShape, simulate_scan
from megatron_lightseq.schedule.scan_place import SCANS, build_scan
from megatron_lightseq.transport import run_loopback
from tests.linear.cases import FAMILIES, attended, error, expected, inputs

MASKS = {
    "causal": [Mask.causal()],
    "documents": [Mask.documents([0, 1, 100, 101, 200, 420])],
    "padded": [Mask.padded([0, 130, 420], [77, 200])],
    "rows": [Mask.documents([0, 140, 150, 420]), Mask.causal()],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_of_ranks_equals_the_recurrence(family: str) -> None:
    tensors, dout = inputs(family, 420, kv_heads=1)
    for name, masks in MASKS.items():
        want = expected(tensors, dout, masks)
        for size in (1, 2, 3, 5, 7) if name == "documents" else (1, 4):
            got = attended(size, tensors, dout, masks if len(masks) > 1 else masks[0])
            assert error(got, want) <= 1e-12, (name, size)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_kernel_equals_the_recurrence(family: str) -> None:
    tensors, dout = inputs(family, 42)
    mask = Mask.documents([0, 5, 29, 42])
    want = expected(tensors, dout, [mask])
    for size in (1, 3):
        assert error(attended(size, tensors, dout, mask, "reference"), want) <= 1e-12, size


def test_eight_ranks_of_shards_that_are_no_whole_pieces() -> None:
    tensors, dout = inputs("gdn", 8 * 521)
    want = expected(tensors, dout, [Mask.causal()])
    assert parts_of(521, grid_piece(8 * 521))[-1] == (512, 521, 9), (
        "the case is about a piece that does not divide a shard"
    )
    assert error(attended(8, tensors, dout), want) <= 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_bits_do_not_depend_on_the_number_of_ranks(family: str) -> None:
    tokens = 1920
    tensors, dout = inputs(family, tokens, dtype=torch.float32)
    mask = Mask.documents([0, 7, 700, 1300, tokens])
    one = attended(1, tensors, dout, mask)
    for size in (2, 3, 4, 5, 6, 8):
        for want, got in zip(one, attended(size, tensors, dout, mask), strict=True):
            assert torch.equal(want, got), size


@pytest.mark.parametrize("tokens", [96, 512, 768, 1920, 4096, 8072, 53760, 1 << 20])
def test_a_grid_is_shared_out_evenly_where_it_can_be(tokens: int) -> None:
    piece = grid_piece(tokens)
    pieces = -(-tokens // piece)
    assert piece <= 512
    assert pieces <= max(256, tokens // 32)
    whole = [size for size in (1, 2, 3, 4, 6, 8) if tokens % size == 0 and tokens // size % piece == 0]
    assert whole == [size for size in (1, 2, 3, 4, 6, 8) if tokens % size == 0] or tokens == 8072


def test_parts_cover_a_shard_in_order() -> None:
    assert parts_of(500, 100, 250) == [(0, 200, 100), (200, 400, 100), (400, 500, 100)]
    assert parts_of(130, 50, 1000) == [(0, 100, 50), (100, 130, 30)]
    assert parts_of(30, 512) == [(0, 30, 30)]


@pytest.mark.parametrize("family", ["scalar", "gdn", "vector", "kda"])
@pytest.mark.parametrize("mean", [-1.0, -15.0])
def test_gradients_of_strong_gates_are_right_in_fp32(family: str, mean: float) -> None:
    tensors, dout = inputs(family, 256)
    assert tensors[3] is not None
    source = torch.Generator().manual_seed(1)
    spread = torch.rand(tensors[3].shape, generator=source, dtype=torch.float64)
    tensors[3] = mean * (0.8 + 0.4 * spread)  # strong ones alone: weak ones would hide their errors
    exact = attended(1, tensors, dout)
    rounded = attended(2, [None if x is None else x.float() for x in tensors], dout.float())
    for want, got in zip(exact, rounded, strict=True):
        assert (got.double() - want).norm() <= 1e-4 * want.norm()


def test_lower_precision_inputs_are_computed_in_fp32() -> None:
    tensors, dout = inputs("gdn", 512)
    low: list[Tensor | None] = [
        None if x is None else x.bfloat16() if i < 3 else x.float() for i, x in enumerate(tensors)
    ]
    got = attended(2, low, dout.bfloat16())
    want = attended(1, [None if x is None else x.double() for x in low], dout.bfloat16().double())
    assert [x.dtype for x in got] == [torch.bfloat16] * 4 + [torch.float32] * 2
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).abs().max() <= 2**-8 * b.abs().max()


def test_normalised_attention_is_a_weighted_mean() -> None:
    (q, k, v, *_), _ = inputs("linear", 64)
    assert q is not None
    assert k is not None
    assert v is not None
    q, k = (torch.nn.functional.elu(x) + 1 for x in (q, k))
    mask = Mask.padded([0, 40, 64], [40, 20])
    out = mls.dist_linear_attention(q, k, v, mask=mask, normalize=True)
    weights = torch.einsum("sbhd,tbhd->bhst", q, k)
    seen = torch.tensor([[t in keys for t in range(64)] for keys in _keys(mask, 64)])
    weights = weights * seen
    want = torch.einsum("bhst,tbhd->sbhd", weights / weights.sum(-1, keepdim=True).clamp(min=1e-30), v)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)


def _keys(mask: Mask, tokens: int) -> list[set[int]]:
    return [{key for keys in mask.keys_of(query) for key in keys} for query in range(tokens)]


@pytest.mark.parametrize("size", [1, 3])
def test_a_kept_result_is_not_computed_again(size: int) -> None:
    tensors, dout = inputs("gdn", 96)
    layout = mls.SequenceLayout.contiguous(size)

    def one(group: Any) -> bool:
        attention = DistLinearAttention(group)

        def leaves() -> dict[str, Tensor]:
            names = ("q", "k", "v", "log_decay", "beta")
            shards = (layout.shard(x, group.rank(), 0) for x in tensors)
            return {name: x.clone().requires_grad_() for name, x in zip(names, shards, strict=True)}

        def grads(out: Tensor, of: dict[str, Tensor]) -> tuple[Tensor, ...]:
            return torch.autograd.grad(out, list(of.values()), layout.shard(dout, group.rank(), 0))

        first = leaves()
        result = attention.forward_with_states(**first)
        again = leaves()
        sent = attention.stats.bytes_sent
        out = attention.reattach(**again, kept=tuple(x.detach() for x in result.kept))
        assert attention.stats.forwards == 1
        assert attention.stats.bytes_sent == sent
        assert torch.equal(out, result.out)
        return all(map(torch.equal, grads(result.out, first), grads(out, again)))

    assert all(run_loopback(size, one))


@pytest.mark.parametrize("scan", SCANS)
def test_bits_do_not_depend_on_the_scan(scan: str) -> None:
    for family in ("scalar", "vector", "gdn"):
        tensors, dout = inputs(family, 1536, dtype=torch.float32)
        mask = [Mask.documents([0, 7, 700, 1300, 1536]), Mask.causal()]
        one = attended(1, tensors, dout, mask)
        for size in (3, 8):
            assert all(map(torch.equal, one, attended(size, tensors, dout, mask, scan=scan))), size


@pytest.mark.parametrize("scan", [*SCANS, "auto"])
@pytest.mark.parametrize("family", ["scalar", "kda"])
def test_scans_of_whole_shards_are_exact(scan: str, family: str) -> None:
    tensors, dout = inputs(family, 448)
    want = attended(1, tensors, dout)
    for size in (2, 7):
        assert error(attended(size, tensors, dout, scan=scan, invariant=False, overlap=False), want) <= 1e-12


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("family", ["scalar", "vector", "gdn"])
@pytest.mark.parametrize("invariant", [True, False])
def test_bytes_are_those_of_the_schedule(scan: str, family: str, invariant: bool) -> None:
    tensors, dout = inputs(family, 8 * 96)
    layout = mls.SequenceLayout.contiguous(8)

    def one(group: Any) -> tuple[int, int]:
        attention = DistLinearAttention(group, scan=scan, invariant=invariant)
        q, k, v, g, b = (None if x is None else layout.shard(x, group.rank(), 0).clone() for x in tensors)
        assert q is not None
        out = attention(q.requires_grad_(), k, v, log_decay=g, beta=b)
        out.backward(layout.shard(dout, group.rank(), 0))
        return attention.stats.bytes_sent, attention.stats.bytes_received

    pieces = 96 // grid_piece(8 * 96) if invariant else None
    transition = {"scalar": 1, "vector": 5, "gdn": None}[family]
    shape = StateShape(
        batch=2, heads=2, key_dim=5, value_dim=4, transition=transition, pieces=pieces, element_bytes=8
    )
    played = [
        simulate_scan(build_scan(scan, layout, direction=direction, seq_length=8 * 96), shape)
        for direction in Direction
    ]
    sent = [sum(direction.bytes_sent[rank] for direction in played) for rank in range(8)]
    received = [sum(direction.bytes_received[rank] for direction in played) for rank in range(8)]
    assert run_loopback(8, one) == list(zip(sent, received, strict=True))


def test_work_without_states_is_done_while_they_travel() -> None:
    tensors, _ = inputs("gdn", 192)
    layout = mls.SequenceLayout.contiguous(2)
    order: list[str] = []

    class Recorded(TorchLinearKernel):
        def inner(self, part: Part, kept: Any) -> Any:
            order.append("inner")
            return super().inner(part, kept)

    def one(group: Any) -> None:
        attention = DistLinearAttention(group, kernel=Recorded() if group.rank() else "torch")
        q, k, v, g, b = (layout.shard(x, group.rank(), 0) for x in tensors)
        transport = attention._runtime.transport
        assert transport is not None
        started = transport.start

        def start(sends: Any, receives: Any) -> Any:
            pending = started(sends, receives)

            class Waited:
                def wait(self) -> None:
                    if group.rank() and receives:
                        order.append("arrived")
                    pending.wait()

            return Waited()

        transport.start = start  # type: ignore[method-assign]
        attention(q, k, v, log_decay=g, beta=b)

    run_loopback(2, one)
    assert order == ["inner", "arrived"]


def _of(**changes: Any) -> dict[str, Any]:
    tensors, _ = inputs("gdn", 12)
    return dict(zip(("q", "k", "v", "log_decay", "beta"), tensors, strict=True)) | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": torch.ones(12, 2, 2)}, "4 dimensions"),
        ({"k": torch.ones(12, 2, 2, 6, dtype=torch.float64)}, "same head dim"),
        ({"v": torch.ones(12, 2, 2, 4)}, "one dtype"),
        ({"v": torch.ones(12, 2, 3, 4, dtype=torch.float64)}, "each divide the largest"),
        ({"beta": torch.ones(12, 2)}, "beta has one number for each of the H heads"),
        ({"beta": torch.ones(12, 2, 2, dtype=torch.int64)}, "floating-point numbers"),
        ({"log_decay": torch.ones(12, 2, 2, 4)}, "one for each channel"),
        ({"scale": 0.0}, "positive, finite"),
        ({"mask": Mask.documents([0, 5])}, "border"),
        ({"mask": [Mask.causal()]}, "one Mask for each row"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        mls.dist_linear_attention(**_of(**changes))


@pytest.mark.parametrize(
    "mask", [Mask.full(), Mask.window(3), Mask.prefix([0, 12], [4]), Mask.documents([0, 5, 12], causal=False)]
)
def test_masks_that_no_state_can_follow_are_refused(mask: Mask) -> None:
    with pytest.raises(UnsupportedError, match="a state holds all earlier tokens"):
        mls.dist_linear_attention(**_of(mask=mask))


def test_windows_that_hold_every_document_are_causal() -> None:
    want = mls.dist_linear_attention(**_of(mask=Mask.documents([0, 5, 12])))
    for mask in (Mask.documents([0, 5, 12]) & Mask.window(9), Mask.documents([0, 5, 12]) & Mask.window(6)):
        assert torch.equal(mls.dist_linear_attention(**_of(mask=mask)), want)
    single = Mask.documents(range(13))
    alone, want = (mls.dist_linear_attention(**_of(mask=single, kernel=k)) for k in ("torch", "reference"))
    assert error([alone], [want]) < 1e-15


def test_unknown_scans_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="states travel by one of ring"):
        mls.dist_linear_attention(**_of(scan="rings"))


@pytest.mark.parametrize("kernel", ["torhc", "nothing"])
def test_unknown_kernels_are_refused(kernel: str) -> None:
    with pytest.raises(UnsupportedError, match="the kernels are auto, "):
        mls.dist_linear_attention(**_of(kernel=kernel))


def test_layouts_without_adjacent_tokens_are_refused() -> None:
    def one(group: Any) -> None:
        with pytest.raises(UnsupportedError, match="every rank holds adjacent ones"):
            mls.dist_linear_attention(**_of(group=group, layout="zigzag"))
        with pytest.raises(LayoutError, match="as many ranks as the group has"):
            mls.dist_linear_attention(**_of(group=group, layout=mls.SequenceLayout.contiguous(3)))

    run_loopback(2, one)
    mls.dist_linear_attention(**_of(layout="zigzag"))  # of one rank, all layouts are the same


@pytest.mark.parametrize(
    "change", [{"scale": 2.0}, {"mask": Mask.documents([0, 24])}, {"beta": None}, {"scan": "doubling"}]
)
def test_ranks_that_disagree_stop_with_words(change: dict[str, Any]) -> None:
    def one(group: Any) -> None:
        with pytest.raises(TransportError, match=r"rank\(s\) \[[01]\] plan something else"):
            mls.dist_linear_attention(**_of(group=group, **(change if group.rank() else {})))

    run_loopback(2, one)
