"""Trainer with its sequences cut: losses, gradient norms, evaluation and weights of one process."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.harness.ranks import run_ranks
from tests.hf import trained

KEPT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
ODD = {"packed": True, "evaluated": 5}
ROUTED = (("output_router_logits", True), ("router_aux_loss_coef", 0.5))
FORWARDS = 2 * (3 * 2 + 3)
"""Layers times (steps x accumulated batches + batches of the evaluation)."""


@cache
def one_process(names: tuple[tuple[str, Any], ...]) -> trained.Outcome:
    found: trained.Outcome = run_ranks(1, trained.train, 1, dict(names))[0]
    return found


def reference(options: dict[str, Any]) -> trained.Outcome:
    """One process with the same data; without checkpoints, which change nothing there."""
    return one_process(tuple((name, x) for name, x in options.items() if name not in KEPT))


def check(outcomes: list[trained.Outcome], wanted: trained.Outcome, tolerance: float = 2e-6) -> None:
    for log, evaluation, weights, _ in outcomes:
        assert len(log) == len(wanted[0])
        for (loss, norm), (want, want_norm) in zip(log, wanted[0], strict=True):
            assert abs(loss - want) <= tolerance
            assert abs(norm - want_norm) <= 5 * tolerance
        assert evaluation.keys() == wanted[1].keys()
        for name, value in evaluation.items():
            assert abs(value - wanted[1][name]) <= 5 * tolerance, (name, value, wanted[1][name])
        for name, x in weights.items():
            assert (x - wanted[2][name]).abs().max() <= tolerance / 2, name


CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "cp2": (2, 2, {}),
    "cp3": (3, 3, {}),
    "dp2 x cp2": (4, 2, {}),
    "cp2, packed, odd evaluation, kept": (2, 2, {**ODD, **KEPT}),
    "dp2 x cp2, packed, odd evaluation": (4, 2, ODD),
    "cp2, experts' load": (2, 2, {"model": "mixtral", "changes": ROUTED}),
    "cp2, tokens of each rank": (2, 2, {"average_tokens_across_devices": False}),
    "cp2, batches count alike": (2, 2, {"counting": False, "evaluated": 5}),
    "cp2, metrics of gathered logits": (2, 2, {"compute_metrics": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_training_and_evaluation_are_those_of_one_process(name: str) -> None:
    ranks, cp_size, options = CASES[name]
    outcomes = run_ranks(ranks, trained.train, cp_size, options)
    check(outcomes, reference(options))
    if "dp2" not in name:
        assert {outcome[3] for outcome in outcomes} == {FORWARDS}


def test_under_autocast_it_is_as_close_as_its_arithmetic() -> None:
    options = {"bf16": True}
    check(run_ranks(2, trained.train, 2, options), reference(options), tolerance=2e-3)


def test_saved_on_two_ranks_and_resumed_on_three_and_one(tmp_path: Path) -> None:
    folder = {"output_dir": str(tmp_path), "save_only_model": False}
    whole = one_process((("max_steps", 4),))
    run_ranks(2, trained.train, 2, {**folder, "max_steps": 4, "save_strategy": "steps", "save_steps": 2})
    checkpoint = str(tmp_path / "checkpoint-2")
    for ranks in (1, 2, 3):
        resumed = run_ranks(ranks, trained.train, ranks, {"max_steps": 4}, checkpoint)
        check(resumed, whole)


REFUSED = {
    "label_smoothing": "label_smoothing_factor=0.1 with context parallelism: it shifts the labels",
    "compute_loss_func": "compute_loss_func with context parallelism: it sees a shard's logits",
    "reentrant": "use_reentrant=True: attention is kept by checkpoints that are not reentrant",
    "accelerate": "sequences are cut once, and accelerate's context parallelism would cut them too",
    "sizes": "cp_size=3 with 2 processes: the sizes multiply to the number of processes",
    "tensor parallel": "cp_size=2 with tp_size=2: context parallelism has been tried with data parallelism only",
}


def test_options_that_would_give_another_loss_are_refused() -> None:
    for said in run_ranks(2, trained.refusals, list(REFUSED)):
        assert said.keys() == REFUSED.keys()
        for name, text in REFUSED.items():
            assert text in said[name], said[name]
