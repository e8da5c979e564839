"""How a state reaches the ranks behind, and its gradient those before: from rank to rank, one state a hop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_lightseq.kernels.linear.contract import StateMap, act
from megatron_lightseq.linear.plan import LinearPlan
from megatron_lightseq.schedule import Direction
from megatron_lightseq.transport import Message


def follow(maps: StateMap, state: Tensor, direction: Direction) -> tuple[Tensor, Tensor]:
    """A state through pieces, one after another.

    Args:
        maps: (n, ...) of the pieces; in the backward direction with the gradients of their entering states in place
            of what they write.
        state: (B, H, K, V), which enters the first piece; or the gradient of the state behind the last one.
        direction: forward, or from the last piece to the first with transposed maps.

    Returns:
        (n, B, H, K, V), the states that reach each piece, and the one that leaves the other end.
    """
    backward = direction is Direction.BACKWARD
    order = range(len(maps.write) - 1, -1, -1) if backward else range(len(maps.write))
    reached: dict[int, Tensor] = {}
    for i in order:
        reached[i] = state
        state = act(maps.transition[i], state, maps.write[i], transposed=backward)
    return torch.stack([reached[i] for i in range(len(reached))]), state


def receive_state(
    plan: LinearPlan, direction: Direction, summaries: Callable[[], Sequence[StateMap]]
) -> Tensor:
    """The state that enters this rank's tokens, or the gradient of the one behind them; collective.

    Args:
        plan: of this rank.
        direction: which of the two.
        summaries: makes the maps of this rank's parts, in their order; called only if another rank waits for them.
    """
    state = plan.zero()
    if plan.transport is None:
        return state
    backward = direction is Direction.BACKWARD
    crossed = (*plan.crossed, False)
    before, after = crossed[plan.rank], crossed[plan.rank + 1]
    arrives, leaves = (after, before) if backward else (before, after)
    step = -1 if backward else 1
    maps = summaries() if leaves else ()
    if arrives:
        _receive(plan, state, plan.rank - step, direction)
    if leaves:
        behind = state
        for part in reversed(maps) if backward else maps:
            behind = follow(part, behind, direction)[1]
        _send(plan, behind.contiguous(), plan.rank + step, direction)
    return state


def _send(plan: LinearPlan, state: Tensor, peer: int, direction: Direction) -> None:
    assert plan.transport is not None, "a single rank sends nothing"
    plan.stats.bytes_sent += state.nbytes
    plan.transport.start([Message(peer, state, 0, f"a state ({direction})")], []).wait()


def _receive(plan: LinearPlan, state: Tensor, peer: int, direction: Direction) -> None:
    assert plan.transport is not None, "a single rank receives nothing"
    plan.stats.bytes_received += state.nbytes
    plan.transport.start([], [Message(peer, state, 0, f"a state ({direction})")]).wait()
