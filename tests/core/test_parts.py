from __future__ import annotations

import random
import warnings
from types import SimpleNamespace

import pytest
import torch

from megatron_lightseq.attention import DistAttention
from megatron_lightseq.attention.stash import AttentionStash
from megatron_lightseq.config.sizes import ParallelSizes
from megatron_lightseq.errors import ConfigError, LightSeqError
from megatron_lightseq.kernels.merge import merge_into
from megatron_lightseq.kernels.registry import LONG_FOR_REFERENCE, resolve_kernel
from megatron_lightseq.training.parallel_groups import ProcessGroups
from megatron_lightseq.transport import BufferPool, LoopbackGroup, pool_of, run_loopback


def test_merging_is_softmax_over_the_union() -> None:
    scores, values = (
        torch.randn(2, 3, 5, 8, dtype=torch.float64),
        torch.randn(2, 3, 8, 4, dtype=torch.float64),
    )

    def partial(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        out = scores[..., part].softmax(-1) @ values[..., part, :]
        return out.permute(2, 0, 1, 3).contiguous(), scores[..., part].logsumexp(-1)

    out, lse = partial(slice(0, 3))
    merge_into(out, lse, *partial(slice(3, 8)))
    want_out, want_lse = partial(slice(0, 8))
    torch.testing.assert_close(out, want_out, rtol=0, atol=1e-14)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-14)


@pytest.mark.parametrize("empty_side", ["left", "right", "both"])
def test_merging_with_an_empty_side_is_exact(empty_side: str) -> None:
    empty = torch.zeros(5, 1, 2, 4), torch.full((1, 2, 5), float("-inf"))
    some = torch.randn(5, 1, 2, 4), torch.randn(1, 2, 5)
    left = [x.clone() for x in (empty if empty_side in ("left", "both") else some)]
    right = empty if empty_side in ("right", "both") else some
    merge_into(*left, *right)
    want = empty if empty_side == "both" else some
    assert all(torch.equal(a, b) for a, b in zip(left, want, strict=True))


def test_stash_is_first_in_first_out_and_checks_shapes() -> None:
    stash = AttentionStash()
    for index in (1.0, 2.0):
        stash.push(torch.full((4, 1, 2, 8), index, requires_grad=True), torch.zeros(1, 2, 4))
    out, _ = stash.pop((4, 1, 2, 16))  # D may differ from Dv
    assert out[0, 0, 0, 0] == 1.0
    assert not out.requires_grad
    with pytest.raises(
        LightSeqError, match=r"queries \(3, 1, 2, 8\), the oldest kept output is \(4, 1, 2, 8\)"
    ):
        stash.pop((3, 1, 2, 8))
    stash.clear()
    with pytest.raises(LightSeqError, match="kept output is None"):
        stash.pop((4, 1, 2, 8))


CPU = torch.device("cpu")


def test_buffers_are_used_again_for_the_same_number_of_bytes() -> None:
    pool = BufferPool()
    first = pool.take((200, 3), torch.float32, CPU)
    address = first.data_ptr()
    pool.give(first)
    again = pool.take((3, 400), torch.bfloat16, CPU)
    assert (again.data_ptr(), again.shape, again.dtype) == (address, (3, 400), torch.bfloat16)
    assert pool.take((200, 3), torch.float32, CPU).data_ptr() != address
    assert again.is_contiguous()


@pytest.mark.parametrize("num_bytes", [1, 511, 512, 513, 1023, 1024, 1025, 10**6, 2**20, 2**20 + 1])
def test_blocks_are_at_most_an_eighth_too_large(num_bytes: int) -> None:
    tensor = BufferPool().take((num_bytes,), torch.uint8, CPU)
    held = tensor.untyped_storage().nbytes()
    assert num_bytes <= held <= max(512, num_bytes * 9 // 8 + 1)


def test_free_blocks_never_hold_more_than_was_in_use() -> None:
    """2,000 different lengths, with two buffers in use at a time."""
    pool = BufferPool()
    rng = random.Random(0)
    for _ in range(2000):
        tensors = [pool.take((rng.randrange(1, 10_000),), torch.float32, CPU) for _ in range(2)]
        for tensor in tensors:
            pool.give(tensor)
        assert pool.free_bytes <= 2 * 10_000 * 4 * 9 / 8


def test_layers_share_receive_buffers() -> None:
    """Memory for transfers does not grow with the number of layers, as it would if every layer had a pool."""

    def held_bytes(num_layers: int) -> list[int]:
        def one_rank(group: LoopbackGroup) -> int:
            hidden = torch.randn(32, 1, 2, 8, requires_grad=True)
            for _ in range(num_layers):
                hidden = DistAttention(group=group, method="lightseq")(hidden, hidden, hidden)
            hidden.sum().backward()
            return pool_of(group).free_bytes

        return run_loopback(4, one_rank)

    one, three = held_bytes(1), held_bytes(3)
    assert min(one) > 0
    assert three == one


def test_buffers_born_in_inference_mode_can_be_written_later() -> None:
    pool = BufferPool()
    with torch.inference_mode():
        pool.give(pool.take((8,), torch.float32, CPU))
    tensor = pool.take((8,), torch.float32, CPU)
    tensor.zero_()
    assert not tensor.is_inference()


def test_auto_warns_before_a_long_sequence_meets_the_reference() -> None:
    q = torch.empty(LONG_FOR_REFERENCE, 1, 1, 2, dtype=torch.float64)
    with pytest.warns(
        UserWarning,
        match=r"falls back to the reference kernel for 4096 tokens of torch.float64 on cpu.*cpu: ",
    ):
        assert resolve_kernel("auto", q, q, q).name == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_kernel("auto", q[:64], q[:64], q[:64]).name == "reference"


def test_parallel_sizes() -> None:
    assert ParallelSizes(world_size=24, tensor=2, pipeline=3, context=2).data == 2
    with pytest.raises(
        ConfigError, match=r"world size 6 with tensor 2 \* pipeline 1 \* context 2 = 4.* Start 4 ranks"
    ):
        ParallelSizes(world_size=6, tensor=2, context=2)
    with pytest.raises(ConfigError, match="context 0"):
        ParallelSizes(world_size=1, context=0)


def test_groups_are_checked_against_the_configuration() -> None:
    class Pair:
        def rank(self) -> int:
            return 0

        def size(self) -> int:
            return 2

    groups = ProcessGroups.from_collection(SimpleNamespace(tp=None, cp=Pair()))
    groups.check(ParallelSizes(world_size=2, context=2))
    with pytest.raises(ConfigError, match="a cp group of 2 ranks, configured 1"):
        groups.check(ParallelSizes(world_size=1))
    ProcessGroups.single().check(ParallelSizes(world_size=1))
    assert ProcessGroups.from_group(None) == ProcessGroups.single()


def test_buffers_taken_in_inference_mode_may_be_written_in_training() -> None:
    pool = BufferPool()
    with torch.inference_mode():
        taken = pool.take((2, 3), torch.float32, torch.device("cpu"))
        taken.zero_()
        address = taken.data_ptr()
        pool.give(taken)
    again = pool.take((2, 3), torch.float32, torch.device("cpu"))
    assert again.data_ptr() == address
    assert not again.is_inference()
    again.add_(1.0)
