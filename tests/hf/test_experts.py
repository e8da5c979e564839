"""The load balancing loss of experts is that of one process, whose tokens are all in one place."""

from __future__ import annotations

import pytest

from tests.harness.ranks import run_ranks
from tests.hf import experts, tiny
from tests.hf.test_parity import GRADIENTS, LOSS

UNPACKED = [kind for kind in tiny.batches() if not kind.startswith("packed")]
CASES: dict[str, list[str]] = {
    "mixtral": list(tiny.batches()),
    "qwen3-moe": ["packed", "padded left"],
    "gpt-oss": ["rows", "padded right"],  # transformers itself loses the documents of packed text
}


def check(rows: list[experts.Row]) -> None:
    assert rows
    wrong = [row for row in rows if not (max(row[3], row[5]) <= 2 * LOSS and row[4] <= GRADIENTS)]
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_one_process(name: str) -> None:
    check(run_ranks(3, experts.compare, name, CASES[name], [2, 3])[0])


def test_checkpoints_and_adapters() -> None:
    check(run_ranks(2, experts.compare, "mixtral", ["packed", "odd length"], [2], "kept")[0])
    pytest.importorskip("peft")
    for task in ("CAUSAL_LM", None):  # of which PEFT calls one through its hooks
        assert max(run_ranks(2, experts.adapted, task)) <= GRADIENTS


REFUSED = {
    "unshared": "output_router_logits with a model that knows the tokens of one rank",
    "asked_by_the_batch": "output_router_logits with a model that knows the tokens of one rank",
    "another_loss": "MixtralForCausalLM, whose aux_loss is not the load balancing loss of Switch Transformer",
}


def test_a_loss_of_a_shard_is_refused() -> None:
    for said in run_ranks(2, experts.refusals):
        assert said.keys() == REFUSED.keys()
        for name, text in REFUSED.items():
            assert text in said[name]
