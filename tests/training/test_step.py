from __future__ import annotations

from typing import Any

import pytest

from tests.harness.ranks import run_ranks
from tests.megatron.runs import batches
from tests.training.saved_runs import built


def graphs_of_training_and_evaluation() -> tuple[list[bool], list[bool]]:
    """Whether the losses of each micro-batch have an autograd graph, in training and in evaluation."""
    from megatron_lightseq.training import step

    loss, found = step._loss, []

    def recorded(training: Any, mask: Any, token_losses: Any) -> Any:
        found.append(token_losses.requires_grad)
        return loss(training, mask, token_losses)

    step._loss = recorded
    try:
        with built({}) as training:
            step.train_step(training, [batches(training, 0)])
            trained, found = found, []
            step.evaluate(training, [batches(training, 1)], 1)
    finally:
        step._loss = loss
    return trained, found


def test_evaluation_builds_no_graph() -> None:
    """A graph would keep the activations of every layer, and they may not fit if training recomputes them."""
    trained, evaluated = run_ranks(1, graphs_of_training_and_evaluation)[0]
    assert trained == [True] * 4
    assert evaluated == [False] * 4


EVALUATED = {
    "plain": {},
    "layers recomputed": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "experts": {"num_experts": 4, "moe_ffn_hidden_size": 48, "moe_aux_loss_coeff": 0.05},
}


def losses_with_and_without_evaluation(overrides: dict[str, Any]) -> tuple[list[float], list[float]]:
    """The losses of two steps after an evaluation in inference mode, and of the same steps without."""
    import torch

    from megatron_lightseq.training import step

    found = []
    for evaluated in (True, False):
        with built({"context_parallel_size": 2, **overrides}) as training:
            if evaluated:
                with torch.inference_mode():
                    step.evaluate(training, [batches(training, 1)], 1)
            found.append([step.train_step(training, [batches(training, i)]).loss for i in range(2)])
    return found[0], found[1]


@pytest.mark.parametrize("name", EVALUATED)
def test_training_follows_an_evaluation_in_inference_mode(name: str) -> None:
    """What is cached between calls (receive buffers, RoPE angles, scales) must not be inference tensors."""
    for after, without in run_ranks(2, losses_with_and_without_evaluation, EVALUATED[name]):
        assert after == without
