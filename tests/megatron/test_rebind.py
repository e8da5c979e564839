"""Methods of one module object call another function; other instances of its class do not."""

from __future__ import annotations

import torch

from megatron_lightseq.megatron.fixes.rebind import rebind


def helper(value: int) -> int:
    return value + 1


class Module(torch.nn.Module):
    def direct(self, value: int, *, times: int = 2) -> int:
        return times * helper(value)

    def nested(self) -> list[int]:
        return [helper(value) for value in range(2)]

    def other(self) -> int:
        return 5


def test_only_this_module_and_only_its_callers_are_bound_anew() -> None:
    ours, theirs = Module(), Module()
    assert rebind(ours, "helper", lambda value: -value) == 2
    assert (ours.direct(3), ours.direct(3, times=5), ours.nested(), ours.other()) == (-6, -15, [0, -1], 5)
    assert (theirs.direct(3), theirs.nested()) == (8, [1, 2])
    assert "other" not in vars(ours)
    assert rebind(ours, "nobody", helper) == 0
