"""Unmodified models of transformers on several ranks: the loss and every gradient of one process."""

from __future__ import annotations

import pytest

from tests.harness.ranks import run_ranks
from tests.hf import parity, tiny

LOSS, GRADIENTS = 1e-6, 3e-6


def check(rows: list[parity.Row]) -> None:
    assert rows
    wrong = [row for row in rows if not (row[4] <= LOSS and row[5] <= GRADIENTS)]
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("name", tiny.MODELS)
def test_loss_and_gradients_are_those_of_one_process(name: str) -> None:
    rows = run_ranks(3, parity.compare, [name], [2, 3], ["without"])[0]
    assert len(rows) == 2 * len(tiny.batches())
    assert {row[6] for row in rows} == {2}  # one forward for each layer
    check(rows)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-oss"])
def test_checkpoints_repeat_attention_only_where_they_are_not_asked_to_keep_it(name: str) -> None:
    rows = run_ranks(2, parity.compare, [name], [2], ["repeated", "kept"])[0]
    check(rows)
    assert {(row[3], row[6]) for row in rows} == {("repeated", 4), ("kept", 2)}


def test_logits_of_all_ranks_are_gathered_in_the_order_of_the_batch() -> None:
    for apart in run_ranks(2, parity.gathered_logits):
        assert max(apart) <= 1e-5, apart


@pytest.mark.parametrize("name", ["gemma3", "gemma2"])
def test_plans_of_the_next_batch_are_made_ahead(name: str) -> None:
    for made in run_ranks(2, parity.planned_ahead, name):
        assert made[0][0] == 2  # layers with windows and without
        assert [plans for plans, _ in made[1:]] == [0] * (len(made) - 1)
        assert max(loss for _, loss in made) <= LOSS
