"""A different mask in every call: one attention object, one pool of buffers, a bounded number of plans."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lightseq import Mask, SequenceLayout, dist_attention
from megatron_lightseq.attention import DistAttention, distributed
from megatron_lightseq.errors import ConfigError, TransportError
from megatron_lightseq.transport import run_loopback
from megatron_lightseq.transport.group import Group
from tests.core import oracle
from tests.harness.ranks import run_ranks

SEQ_LENGTH = 2 * 48


def masks(count: int, seed: int = 0) -> list[Mask]:
    rng = random.Random(seed)
    return [
        Mask.documents((0, *sorted(rng.sample(range(1, SEQ_LENGTH), rng.randrange(6))), SEQ_LENGTH))
        for _ in range(count)
    ]


@pytest.mark.parametrize("method", ["lightseq", "balanced", "ulysses", "rsa"])
def test_every_call_follows_its_own_mask(method: str) -> None:
    """Several forward passes with different masks, then their backward passes."""
    whole = oracle.inputs(SEQ_LENGTH, (4, 2), (8, 5), torch.float64)
    layout = SequenceLayout.contiguous(2)
    wanted = masks(5)

    def attend(group: Group) -> list[list[Tensor]]:
        attention = DistAttention(group, method=method)
        calls = []
        for mask in wanted:
            q, k, v, dout = (layout.shard(x, group.rank(), 0).clone() for x in whole)
            inputs = [x.requires_grad_() for x in (q, k, v)]
            calls.append((attention(*inputs, mask=mask), inputs, dout))
        return [[out.detach(), *torch.autograd.grad(out, inputs, dout)] for out, inputs, dout in calls]

    parts = run_loopback(2, attend)
    for index, mask in enumerate(wanted):
        for i, want in enumerate(oracle.expected(whole, mask)):
            got = layout.unshard([part[index][i] for part in parts], 0)
            assert (got - want).abs().max() <= 1e-12, (str(mask), oracle.NAMES[i])


def test_the_number_of_plans_is_bounded_and_those_used_last_are_kept() -> None:
    attention = DistAttention(None, kernel="reference")
    q = torch.randn(SEQ_LENGTH, 1, 1, 4)
    first, *others = [
        Mask.documents((0, border, SEQ_LENGTH)) for border in range(1, distributed.MAX_PLANS + 20)
    ]
    for mask in others:
        attention(q, q, q, mask=first)
        attention(q, q, q, mask=mask)
    kept = [mask for _, mask in attention._plans]
    assert len(kept) == distributed.MAX_PLANS
    assert first in kept
    assert others[-1] in kept
    assert others[0] not in kept


def bytes_held(count: int, passes: int) -> list[tuple[int, int]]:
    """Bytes of free buffers, and the most that were in use at one time, after every pass over so many masks."""
    import torch.distributed as dist

    group = dist.group.WORLD
    assert group is not None
    q, k, v = (torch.randn(SEQ_LENGTH // 2, 1, 2, 8).requires_grad_() for _ in range(3))
    held = []
    for _ in range(passes):
        for mask in masks(count, seed=2):
            dist_attention(q, k, v, group=group, method="balanced", mask=mask).sum().backward()
        attentions = distributed._ATTENTIONS[group]
        assert len(attentions) == 1
        buffers = next(iter(attentions.values()))._planner.runtime.buffers
        held.append((buffers.free_bytes, buffers.peak_bytes))
    return held


def test_new_masks_leave_nothing_behind() -> None:
    """More of them than plans are kept, so that every pass plans all of them anew."""
    for (_, peak), *later in run_ranks(2, bytes_held, distributed.MAX_PLANS + 36, 3):
        for free, peak_later in later:
            assert free <= peak_later == peak


def evaluate_then_train() -> float:
    import torch.distributed as dist

    group = dist.group.WORLD
    q, k, v = (torch.randn(16, 1, 4, 8) for _ in range(3))
    with torch.inference_mode():
        dist_attention(q, k, v, group=group)
    for x in (q, k, v):
        x.requires_grad_()
    for _ in range(2):
        dist_attention(q, k, v, group=group).sum().backward()
    assert q.grad is not None
    return float(q.grad.abs().sum())


def test_training_follows_an_evaluation_in_inference_mode() -> None:
    assert all(total > 0 for total in run_ranks(2, evaluate_then_train))


# --- plans made ahead --------------------------------------------------------------------------------------


def train_on_prepared_masks() -> dict[str, int]:
    """Collectives that are started while plans are made, and within steps of two layers that use them."""
    import torch.distributed as dist

    group = dist.group.WORLD
    assert group is not None
    attention = DistAttention(group, method="balanced")
    shards = [torch.randn(SEQ_LENGTH // 2, 2, 2, 8).requires_grad_() for _ in range(3)]
    attention(*shards)  # agrees on the softmax scale
    batches = [(first, second) for first, second in zip(masks(6, seed=3), masks(6, seed=4), strict=True)]
    counts = {"prepared": 0, "in steps": 0}
    now = "prepared"
    gather = dist.all_gather

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts[now] += 1
        return gather(*args, **kwargs)

    names = [
        name for name in dir(dist) if name.startswith(("all_", "broadcast", "reduce", "barrier", "gather"))
    ]
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(dist, name, counted if name == "all_gather" else None)
        for batch in batches:
            attention.prepare(batch)
        now = "in steps"
        for batch in batches:
            for _layer in range(2):
                attention(*shards, mask=batch).sum().backward()
    return counts


def test_steps_with_prepared_masks_start_no_collective() -> None:
    assert run_ranks(2, train_on_prepared_masks) == [{"prepared": 6, "in steps": 0}] * 2


def prepare_other_masks() -> str:
    import torch.distributed as dist

    group = dist.group.WORLD
    assert group is not None
    attention = DistAttention(group, method="lightseq")
    q = torch.randn(SEQ_LENGTH // 2, 1, 2, 8)
    mask = Mask.documents((0, 40 + group.rank(), SEQ_LENGTH))
    attention.prepare(mask, like=(q, q, q))  # no rank waits here, so none learns of the other's mask
    try:
        attention(q, q, q, mask=mask)
    except TransportError as error:
        return str(error)
    return "no error"


def test_prepared_masks_that_differ_between_ranks_are_found_at_first_use() -> None:
    for rank, message in enumerate(run_ranks(2, prepare_other_masks)):
        assert f"rank {rank} plans lightseq on contiguous(2)" in message
        assert f"rank(s) [{1 - rank}] plan something else" in message


def test_plans_can_be_prepared_for_the_last_inputs_or_for_given_ones() -> None:
    attention = DistAttention(None, kernel="reference")
    q = torch.randn(8, 1, 1, 4)
    with pytest.raises(ConfigError, match="before the first call"):
        attention.prepare(Mask.causal())
    attention.prepare(Mask.documents((0, 3, 8)), like=(q, q, q))
    attention(q, q, q, mask=Mask.documents((0, 3, 8)))
    assert len(attention._plans) == 1
    attention.prepare(Mask.documents((0, 4, 8)))
    with pytest.raises(ConfigError, match="a mask ending at 9 for 8 tokens"):
        attention.prepare(Mask.documents((0, 9)))
    assert len(attention._plans) == 2


def test_more_prepared_plans_than_are_kept_leave_nothing_behind() -> None:
    attention = DistAttention(None, kernel="reference")
    q = torch.randn(SEQ_LENGTH, 1, 1, 4)
    for border in range(1, distributed.MAX_PLANS + 9):
        attention.prepare(Mask.documents((0, border, SEQ_LENGTH)), like=(q, q, q))
    assert len(attention._plans) == len(attention._unsettled) == distributed.MAX_PLANS
