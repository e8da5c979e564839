"""The autograd function of linear attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_lightseq.attention.autograd import without_autocast
from megatron_lightseq.kernels.linear.contract import StateMap
from megatron_lightseq.linear.exchange import follow, receive_state
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
            plan.stats.forwards += 1
        ctx.save_for_backward(*tensors, states, transitions)
        ctx.plan = plan
        ctx.mark_non_differentiable(states, transitions)
        return out, states, transitions

    @staticmethod
    @torch.autograd.function.once_differentiable
    @torch.compiler.disable
    def backward(ctx: Any, dout: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *tensors, states, transitions = ctx.saved_tensors
        with without_autocast(dout.device):
            gradients = _run_backward(ctx.plan, tensors, dout, states, transitions)
        return *gradients, None, None


def _run_forward(plan: LinearPlan, tensors: tuple[Tensor | None, ...]) -> Kept:
    kernel, parts = plan.kernel, [(at, plan.part(tensors, *at)) for at in plan.parts]
    done: list[tuple[StateMap, Any]] = []

    def summaries() -> list[StateMap]:
        done.extend(kernel.summarise(part) for _, part in parts)
        return [summary for summary, _ in done]

    state = receive_state(plan, Direction.FORWARD, summaries)
    first = parts[0][1].v
    out = first.new_empty(*plan.inputs.q_shape[:2], plan.inputs.heads, first.shape[3])
    states, transitions = [], []
    for index, ((start, stop, _), part) in enumerate(parts):
        summary, kept = done[index] if done else kernel.summarise(part)
        entering, state = follow(summary, state, Direction.FORWARD)
        out[start:stop] = kernel.outer(part, kernel.inner(part, kept), entering)
        states.append(entering)
        transitions.append(summary.transition)
    return out, torch.cat(states), torch.cat(transitions)


def _run_backward(
    plan: LinearPlan, tensors: list[Tensor | None], dout: Tensor, states: Tensor, transitions: Tensor
) -> list[Tensor | None]:
    kernel, parts = plan.kernel, [(at, plan.part(tensors, *at)) for at in plan.parts]
    sizes = [part.pieces for _, part in parts]
    entering, maps = states.split(sizes), transitions.split(sizes)

    def summaries() -> list[StateMap]:
        gives = (kernel.summarise_backward(part, dout[start:stop]) for (start, stop, _), part in parts)
        return [StateMap(*pair) for pair in zip(maps, gives, strict=True)]

    gradient = receive_state(plan, Direction.BACKWARD, summaries)
    found = [None if x is None else torch.empty_like(x) for x in tensors]
    for index in reversed(range(len(parts))):
        (start, stop, _), part = parts[index]

        def fold(gives: Tensor, transition: Tensor = maps[index]) -> Tensor:
            nonlocal gradient
            behind, gradient = follow(StateMap(transition, gives), gradient, Direction.BACKWARD)
            return behind

        gradients = kernel.backward(part, dout[start:stop], entering[index], fold)
        for whole, grad in zip(found, gradients, strict=True):
            if whole is not None and grad is not None:
                whole[start:stop] = grad
    return found
