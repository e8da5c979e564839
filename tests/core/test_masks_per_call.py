"""A different mask in every call: one attention object, one pool of buffers, a bounded number of plans."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from megatron_lightseq import Mask, SequenceLayout, dist_attention
from megatron_lightseq.attention import DistAttention, distributed
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


def bytes_held(count: int) -> list[int]:
    """Bytes of free buffers after ``count`` masks, and after three times as many."""
    import torch.distributed as dist

    group = dist.group.WORLD
    assert group is not None
    q, k, v = (torch.randn(SEQ_LENGTH // 2, 1, 2, 8).requires_grad_() for _ in range(3))
    held = []
    for index, mask in enumerate(masks(3 * count, seed=2)):
        dist_attention(q, k, v, group=group, method="balanced", mask=mask).sum().backward()
        if index + 1 in (count, 3 * count):
            attentions = distributed._ATTENTIONS[group]
            assert len(attentions) == 1
            (attention,) = attentions.values()
            held.append(attention._planner.runtime.buffers.free_bytes)
    return held


def test_new_masks_leave_nothing_behind() -> None:
    for before, after in run_ranks(2, bytes_held, 100):
        assert after <= before * 1.01


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
