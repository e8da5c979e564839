"""The autograd function of linear attention."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from megatron_lightseq.attention.autograd import without_autocast
from megatron_lightseq.kernels.linear.contract import StateMap
from megatron_lightseq.linear.exchange import ScanSteps, follow
from megatron_lightseq.linear.plan import LinearPlan
from megatron_lightseq.schedule import Direction

Kept = tuple[Tensor, Tensor, Tensor]
"""The output (S, B, H, V), in v's dtype; the states (n, B, H, K, V) that enter the n pieces of a shard; what the pieces
multiply a state by (n, B, H, 1 or K, 1 or K), both in the accumulator dtype and not differentiable."""


class LinearFunction(torch.autograd.Function):
    """Runs a plan's forward, or takes a kept result instead, and its backward."""

    @staticmethod
    @torch.compiler.disable
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        beta: Tensor | None,
        kept: Kept | None,
        plan: LinearPlan,
    ) -> Kept:
        tensors = (q, k, v, log_decay, beta)
        if kept is not None:
            out, states, transitions = (result.view_as(result) for result in kept)
        else:
            with without_autocast(q.device):
                out, states, transitions = _run_forward(plan, tensors)
            plan.runtime.stats.forwards += 1
        ctx.save_for_backward(*tensors, states, transitions)
        ctx.plan, ctx.layer = plan, plan.runtime.stats.place.layer
        ctx.mark_non_differentiable(states, transitions)
        return out, states, transitions

    @staticmethod
    @torch.autograd.function.once_differentiable
    @torch.compiler.disable
    def backward(ctx: Any, dout: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *tensors, states, transitions = ctx.saved_tensors
        ctx.plan.runtime.stats.place.layer = ctx.layer
        with without_autocast(dout.device):
            gradients = _run_backward(ctx.plan, tensors, dout, states, transitions)
        return *gradients, None, None


def _run_forward(plan: LinearPlan, tensors: tuple[Tensor | None, ...]) -> Kept:
    kernel, parts = plan.kernel, [(at, plan.part(tensors, *at)) for at in plan.parts]
    summaries: dict[int, tuple[StateMap, Any]] = {}
    inner: dict[int, Any] = {}

    def summarise(index: int) -> StateMap:
        if index not in summaries:
            summaries[index] = kernel.summarise(parts[index][1])
        return summaries[index][0]

    def compute_inner(index: int) -> Any:
        summarise(index)
        return kernel.inner(parts[index][1], summaries[index][1])

    def meanwhile() -> None:
        inner.update((index, compute_inner(index)) for index in range(len(parts))[:PARTS_AHEAD])

    steps = ScanSteps(plan, Direction.FORWARD, lambda: _joined(map(summarise, range(len(parts)))), meanwhile)
    plan.runtime.execute(steps)
    state, first = steps.result, parts[0][1].v
    out = first.new_empty(*plan.inputs.q_shape[:2], plan.inputs.heads, first.shape[3])
    states, transitions = [], []
    for index, ((start, stop, _), part) in enumerate(parts):
        entering, state = follow(summarise(index), state, Direction.FORWARD)
        ready = inner.pop(index) if index in inner else compute_inner(index)
        kernel.outer(part, ready, entering, out[start:stop])
        states.append(entering)
        transitions.append(summaries.pop(index)[0].transition)
    return out, torch.cat(states), torch.cat(transitions)


PARTS_AHEAD = 4
"""Parts that are computed while states travel: more would be memory that grows with the shard."""


def _joined(maps: Iterable[StateMap]) -> StateMap:
    return StateMap(*(torch.cat(parts) for parts in zip(*maps, strict=True)))


def _run_backward(
    plan: LinearPlan, tensors: list[Tensor | None], dout: Tensor, states: Tensor, transitions: Tensor
) -> list[Tensor | None]:
    kernel, parts = plan.kernel, [(at, plan.part(tensors, *at)) for at in plan.parts]
    sizes = [part.pieces for _, part in parts]
    entering, maps = states.split(sizes), transitions.split(sizes)
    given: dict[int, tuple[Tensor, Any]] = {}

    def summarise(index: int) -> Tensor:
        (start, stop, _), part = parts[index]
        if index not in given:
            gives, kept = kernel.summarise_backward(part, dout[start:stop])
            given[index] = gives, kept if index == len(parts) - 1 else None
        return given[index][0]

    def own() -> StateMap:
        return StateMap(transitions, torch.cat([summarise(index) for index in range(len(parts))]))

    steps = ScanSteps(plan, Direction.BACKWARD, own, lambda: summarise(len(parts) - 1))
    plan.runtime.execute(steps)
    gradient = steps.result
    found = [
        None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors
    ]
    for index in reversed(range(len(parts))):
        (start, stop, _), part = parts[index]
        if index not in given:
            given[index] = kernel.summarise_backward(part, dout[start:stop])
        gives, kept = given.pop(index)
        behind, gradient = follow(StateMap(maps[index], gives), gradient, Direction.BACKWARD)
        slices = [None if x is None else x[start:stop] for x in found]
        kernel.backward(part, dout[start:stop], entering[index], behind, kept, slices)
    return found
