"""Distributed attention in compiled models: no graph break, and the values and gradients of the call itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from docs.examples import compiled_fsdp2
from megatron_lightseq import Mask
from megatron_lightseq.attention import DistAttention, OperatorAttention
from tests.harness.ranks import run_ranks


def losses() -> list[float]:
    return compiled_fsdp2.main(backend="aot_eager")


def test_a_compiled_model_with_fsdp2_trains_as_on_one_rank() -> None:
    wanted = run_ranks(1, losses)[0]
    assert len(set(wanted)) == compiled_fsdp2.STEPS
    for found in run_ranks(2, losses):
        assert found == pytest.approx(wanted, abs=2e-6)


def test_the_operator_is_sound_and_equal_to_the_call() -> None:
    attention = DistAttention(mask=Mask.window(5))
    operator = OperatorAttention(attention)

    def inputs() -> list[Tensor]:
        random = torch.Generator().manual_seed(3)
        return [torch.randn(12, 2, heads, 8, generator=random).requires_grad_() for heads in (4, 2, 2)]

    ours, theirs = inputs(), inputs()
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    found, wanted = compiled(*ours, 0.4), attention(*theirs, 0.4)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    weights = torch.randn(found.shape)
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=0)
    torch.library.opcheck(torch.ops.mls.dist_attention, (*inputs(), operator._number, 0.4))
