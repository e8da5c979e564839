"""What a CUDA graph allows, on one rank and without a GPU: with a plan that exists, a call reads no value back to the
host, and makes no tensor of host data."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lightseq import Mask
from megatron_lightseq.attention.distributed import DistAttention

SYNCS = (
    "_local_scalar_dense",
    "nonzero",
    "equal",
    "is_nonzero",
    "unique",
    "masked_select",
    "repeat_interleave",
)
"""Operators that wait for the device, because their results or the shapes of these depend on values."""
FROM_HOST = ("lift_fresh", "scalar_tensor", "from_file")
"""Operators that begin a tensor of host data, which is then copied from memory that is not pinned."""
MASKS = {
    "causal": Mask.causal(),
    "window": Mask.window(20),
    "documents": Mask.documents((0, 40, 88, 128)),
    "sinks": Mask.window(20) | (Mask.causal() & Mask.sinks(4)),
}


class CaptureRules(TorchDispatchMode):
    """Notes the operators that could not be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.forbidden: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        if name in SYNCS or name in FROM_HOST:
            self.forbidden.append(name)
        return func(*args, **(kwargs or {}))


def tensors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and dout of 128 tokens."""
    q, k, v = (torch.randn(128, 1, heads, 32, requires_grad=True) for heads in (4, 2, 2))
    return q, k, v, torch.randn(128, 1, 4, 32)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_planned_call_can_be_captured(mask: Mask, softcap: float | None) -> None:
    attention = DistAttention(mask=mask, softcap=softcap)
    q, k, v, dout = tensors()
    attention(q, k, v).backward(dout)
    with CaptureRules() as rules:
        attention(q, k, v).backward(dout)
    assert rules.forbidden == []
    assert rules.calls["attention_forward"] >= 1
    assert rules.calls["attention_backward"] >= 1


def test_a_call_with_a_learned_scale_or_a_new_mask_cannot() -> None:
    """Both need numbers on the host: the rules notice what breaks them."""
    q, k, v, dout = tensors()
    attention = DistAttention()
    attention(q, k, v).backward(dout)
    with CaptureRules() as rules:
        attention(q, k, v, mask=MASKS["documents"])
    assert {"lift_fresh", "_local_scalar_dense"} <= set(rules.forbidden)
    with CaptureRules() as rules:
        attention(q, k, v, torch.tensor(0.5))
    assert "_local_scalar_dense" in rules.forbidden
