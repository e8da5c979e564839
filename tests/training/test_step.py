from __future__ import annotations

from typing import Any

from tests.harness.ranks import run_ranks
from tests.megatron.runs import batches
from tests.training.saved_runs import built


def graphs_of_training_and_evaluation() -> tuple[list[bool], list[bool]]:
    """Whether each micro-batch's losses hang on a graph, while training and while evaluating."""
    from megatron_lightseq.training import step

    loss, found = step._loss, []

    def recorded(training: Any, mask: Any, whole_mask: Any, token_losses: Any) -> Any:
        found.append(token_losses.requires_grad)
        return loss(training, mask, whole_mask, token_losses)

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
    """It would hold every layer's activations, on machines that recompute them in training for want of memory."""
    trained, evaluated = run_ranks(1, graphs_of_training_and_evaluation)[0]
    assert trained == [True] * 4
    assert evaluated == [False] * 4
