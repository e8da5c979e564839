"""The loss by position is that of the tokens at those positions, on any ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lightseq.cli import run
from megatron_lightseq.training.reporting.metrics import ValidationMetrics, read_metrics
from tests.harness.ranks import run_ranks
from tests.megatron.runs import batches
from tests.training.launched import OUR_LAUNCHER, launch, make_corpus
from tests.training.saved_runs import built

NUM_BATCHES = 2


def by_position(overrides: dict[str, Any], num_buckets: int) -> list[Any]:
    """The buckets of a fresh model."""
    from megatron_lightseq.training.by_position import loss_by_position

    with built({"init_method_std": 0.2, **overrides}) as training:
        return loss_by_position(training, [_batches(training)], NUM_BATCHES, num_buckets)


def whole_loss(overrides: dict[str, Any]) -> Any:
    """The same model's evaluation."""
    from megatron_lightseq.training.step import evaluate

    with built({"init_method_std": 0.2, **overrides}) as training:
        return evaluate(training, [_batches(training)], NUM_BATCHES)


def losses_one_by_one() -> torch.Tensor:
    """(2, seq_length): sums of losses and numbers of labels, from a forward pass of one model."""
    with built({"init_method_std": 0.2}) as training:
        (model,) = training.models
        found = torch.zeros(2, training.config.training.seq_length, dtype=torch.float64)
        with torch.no_grad():
            for batch in _batches(training):
                losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"]).double()
                found[0] += (losses * batch["loss_mask"]).sum(0)
                found[1] += batch["loss_mask"].sum(0)
    return found


def _batches(training: Any) -> Any:
    return (batch for number in range(NUM_BATCHES) for batch in batches(training, number))


RANKS: dict[str, tuple[int, dict[str, Any]]] = {
    "CP 2": (2, {"context_parallel_size": 2}),
    "CP 3, zigzag": (3, {"context_parallel_size": 3, "cp_method": "zigzag"}),
    "PP 2": (2, {"pipeline_model_parallel_size": 2}),
    "TP 2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "DP 2": (2, {}),
}


@pytest.mark.parametrize("kind", RANKS)
def test_every_number_of_ranks_gives_the_same_losses(kind: str) -> None:
    size, overrides = RANKS[kind]
    (alone,) = run_ranks(1, by_position, {}, 7)
    for found in run_ranks(size, by_position, overrides, 7):
        assert [(x.first, x.last, x.num_tokens) for x in found] == [
            (x.first, x.last, x.num_tokens) for x in alone
        ]
        torch.testing.assert_close(
            torch.tensor([x.loss for x in found]), torch.tensor([x.loss for x in alone]), rtol=1e-5, atol=0
        )


def test_buckets_are_those_of_single_tokens() -> None:
    (sums, counts) = run_ranks(1, losses_one_by_one)[0]
    (found,) = run_ranks(1, by_position, {}, 7)
    length = len(sums)
    assert [x.first for x in found] == [0, *(x.last + 1 for x in found[:-1])]
    assert found[-1].last == length - 1
    for bucket in found:
        chosen = slice(bucket.first, bucket.last + 1)
        assert bucket.num_tokens == counts[chosen].sum()
        assert bucket.loss == pytest.approx(float(sums[chosen].sum() / counts[chosen].sum()), rel=1e-5)
    assert len({round(x.loss, 6) for x in found}) == 7
    (whole,) = run_ranks(1, whole_loss, {})
    mean = sum(x.loss * x.num_tokens for x in found) / sum(x.num_tokens for x in found)
    assert whole.loss == pytest.approx(mean, rel=1e-5)


def test_a_checkpoint_has_the_loss_that_its_run_has_measured(tmp_path: Path) -> None:
    corpus, written = make_corpus(tmp_path), tmp_path / "eval.json"
    flags = {"split": "50,50,0", "eval_iters": 3}
    _finished(corpus, tmp_path / "run", eval_interval=12, **flags)
    metrics = read_metrics(tmp_path / "run/report/metrics.jsonl")
    (measured,) = [one.loss for one in metrics if isinstance(one, ValidationMetrics)]
    evaluate = ("-m", "megatron_lightseq", "eval", "--buckets", "5", "--output", str(written))
    text = _finished(corpus, tmp_path / "eval", program=evaluate, load=tmp_path / "run/checkpoints", **flags)
    found = json.loads(written.read_text())
    assert found["loss"] == pytest.approx(measured, rel=1e-6)
    assert [one["first"] for one in found["by_position"]] == [0, 13, 26, 39, 52]
    assert "positions        52 to        63  loss" in text
    assert found["sequences"] == 6
    assert not (tmp_path / "eval/checkpoints").exists()


def _finished(corpus: Path, folder: Path, **options: Any) -> str:
    """What two ranks have printed."""
    launched = launch(corpus, folder, launcher=OUR_LAUNCHER, **options)
    try:
        assert launched.wait() == 0, launched.text()
    finally:
        launched.stop()
    return launched.text()


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        ([], "no --load"),
        (["--load", "here", "--buckets", "65"], "--buckets 65 with seq_length 64"),
        (["--load", "here", "--buckets", "0"], "--buckets 0 with seq_length 64"),
    ],
)
def test_what_cannot_be_evaluated_is_said(
    flags: list[str], pattern: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["eval", "--data-path", "text", "--seq-length", "64", *flags]) == 2
    assert pattern in capsys.readouterr().err
