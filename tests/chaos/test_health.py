"""Bad steps, poisoned checkpoints, batches and copies of weights that differ."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from megatron_lightseq.training.checkpoint.directory import CheckpointDirectory
from megatron_lightseq.training.checkpoint.health_marks import failures, is_healthy
from megatron_lightseq.training.health.judge import FEWEST_STEPS, LEAST_RISE, WINDOW_STEPS, LossWindow
from tests.chaos.sick_runs import Ran, run_sick
from tests.harness.ranks import run_ranks
from tests.training.launched import make_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_corpus(tmp_path_factory.mktemp("corpus")))


def ran(corpus: str, overrides: dict[str, Any], *fault: Any, ranks: int = 1) -> Ran:
    return run_ranks(ranks, run_sick, corpus, overrides, *fault)[0]


def saved(root: Path) -> list[str]:
    return [path.name for path in CheckpointDirectory(root=root).candidates()]


@pytest.fixture(scope="module")
def sound(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """An undisturbed run."""
    root = tmp_path_factory.mktemp("sound")
    found = ran(corpus, {"save": str(root), "save_interval": 1})
    assert (found.error, found.reached) == ("", 6)
    assert not any("WARNING" in note for note in found.notes)
    folders = CheckpointDirectory(root=root).candidates()
    assert [is_healthy(folder) for folder in folders] == [False, *[True] * 5], "the last one has no next step"
    return found


# ---- judging --------------------------------------------------------------------------------------------------


def test_losses_of_clean_training_are_no_spikes() -> None:
    rng = random.Random(0)
    window = LossWindow()
    for step in range(10_000):
        loss = 2.0 + 4.0 / (1 + step / 50) + rng.gauss(0, 0.05) + (0.6 if rng.random() < 0.05 else 0.0)
        assert not window.is_spike(loss, 20.0), step
        window.add(loss)


def test_a_spike_is_far_above_the_window_and_needs_one() -> None:
    window = LossWindow([2.0] * (FEWEST_STEPS - 1))
    assert not window.is_spike(100.0, 20.0)
    window.add(2.0)
    assert window.is_spike(2.0 + LEAST_RISE + 0.1, 20.0)
    assert not window.is_spike(2.0 + LEAST_RISE - 0.1, 20.0)
    noisy = LossWindow([2.0, 2.2] * WINDOW_STEPS)
    assert len(noisy.losses) == WINDOW_STEPS
    assert not noisy.is_spike(4.0, 20.0)
    assert noisy.is_spike(4.2, 20.0)


# ---- steps ----------------------------------------------------------------------------------------------------


def test_a_transient_fault_is_repeated_away(corpus: str, tmp_path: Path, sound: Ran) -> None:
    found = ran(corpus, {"report_dir": str(tmp_path)}, "nan once", 3)
    assert (found.error, found.losses, found.weights) == ("", sound.losses, sound.weights)
    assert "WARNING: step 3: loss nan, grad norm nan, and loss" in found.notes[0]
    assert "a transient fault" in found.notes[0]


def test_a_step_that_is_not_finite_twice_ends_the_run_before_its_update(corpus: str, tmp_path: Path) -> None:
    found = ran(corpus, {"save": str(tmp_path), "save_interval": 2}, "nan", 4)
    expected = "LightSeqError: step 4: loss nan, grad norm nan, and the same when it was repeated"
    # The module behind the one that was made to return NaN when all had been looked at.
    assert found.error.startswith(f"{expected}; first not finite: rank 0: output of decoder.final_layernorm")
    assert "the weights were not updated" in found.error
    assert saved(tmp_path) == ["iter_0000002"]
    before = ran(corpus, {"train_iters": 3, "lr_decay_iters": 6})
    assert found.weights == before.weights


def test_bad_batches_are_skipped_up_to_a_number(corpus: str, tmp_path: Path, sound: Ran) -> None:
    skip = {"on_nonfinite_step": "skip", "max_bad_steps": 2}
    found = ran(corpus, {**skip, "report_dir": str(tmp_path)}, "nan", 4)
    assert (found.error, found.reached) == ("", 6)
    assert "step 4 is left out: its batch is skipped" in found.notes
    assert [found.losses[step] == sound.losses[step] for step in range(1, 7)] == [True] * 3 + [False] * 3
    again = ran(corpus, skip, "nan", 4)
    assert again.weights == found.weights != sound.weights, "the decision is replayed bit for bit"
    assert "step 5: loss nan" in ran(corpus, skip, "nan from", 3).error


def test_rollback_takes_the_newest_healthy_checkpoint_and_a_restart_replays_it(
    corpus: str, tmp_path: Path
) -> None:
    settings = {"save_interval": 2, "on_nonfinite_step": "rollback"}
    root = tmp_path / "a"
    found = ran(corpus, {**settings, "save": str(root)}, "nan", 5)
    assert (found.error, found.reached) == ("", 6)
    # iter_0000004 has no good next step
    assert any(note.startswith(f"rolled back to the weights of {root}/iter_0000002") for note in found.notes)
    assert saved(root) == ["iter_0000006", "iter_0000005", "iter_0000004", "iter_0000002"]
    chosen = {"load": str(root), "load_iteration": 5, "save": str(tmp_path / "b")}
    assert ran(corpus, chosen).weights == found.weights
    early = ran(corpus, {**settings, "save": str(tmp_path / "c")}, "nan", 2)
    assert "step 2: loss nan" in early.error, "there is no healthy checkpoint yet"


def test_a_spike_is_reported_or_left_out(corpus: str, tmp_path: Path) -> None:
    more = {"train_iters": 20, "seq_length": 32, "loss_spike_factor": 5.0}
    found = ran(corpus, more, "spike", 18)
    assert (found.error, found.reached) == ("", 20)
    assert next(note for note in found.notes if "WARNING" in note).startswith("WARNING: step 18: loss")
    skipped = ran(corpus, {**more, "on_loss_spike": "skip"}, "spike", 18)
    assert "step 18 is left out: its batch is skipped" in skipped.notes
    assert skipped.weights != found.weights
    assert "step 18: loss" in ran(corpus, {**more, "on_loss_spike": "stop"}, "spike", 18).error
    assert ran(corpus, {**more, "on_loss_spike": "off"}, "spike", 18).notes == []


# ---- checkpoints ----------------------------------------------------------------------------------------------


def test_what_is_not_finite_is_not_saved(corpus: str, tmp_path: Path) -> None:
    found = ran(corpus, {"save": str(tmp_path), "save_interval": 1}, "nan before save", 3)
    assert found.error.startswith("SpoiledStateError: not saved: weights decoder.layers.0.mlp.linear_fc1")
    assert saved(tmp_path) == ["iter_0000002", "iter_0000001"]
    assert not list(tmp_path.glob("*.tmp-*"))


def test_a_run_recovers_from_a_poisoned_checkpoint_within_one_restart(
    corpus: str, tmp_path: Path, sound: Ran
) -> None:
    settings = {"save": str(tmp_path), "save_interval": 1}
    first = ran(corpus, settings, "flip before save", 4)
    assert "step 5: loss" in first.error
    assert failures(tmp_path / "iter_0000004") == 1
    restarted = ran(corpus, settings, "", 0, 1)
    assert (restarted.error, restarted.reached) == ("", 6)
    assert any("resumed from" in note and "iter_0000003 at step 3" in note for note in restarted.notes)
    assert (restarted.losses, restarted.weights) == (sound.losses, sound.weights)
    assert is_healthy(tmp_path / "iter_0000004"), "saved again, and its next step was good"


def test_a_run_goes_on_with_the_data_it_began_with(
    corpus: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = str(make_corpus(tmp_path_factory.mktemp("other"), seed=1))
    run_ranks(1, run_sick, corpus, {"save": str(tmp_path), "train_iters": 2})
    resumed = {"load": str(tmp_path), "train_iters": 3}
    for given, key in ((other, "corpus"), (("0.5", corpus, "0.5", other), "mixture")):
        found = ran(corpus, {**resumed, "data_path": (given,) if isinstance(given, str) else given})
        assert f"{key} is " in found.error
        assert "continue on other data with --data-may-change" in found.error
    assert ran(corpus, {**resumed, "data_path": (other,), "data_may_change": True}).reached == 3
    assert ran(corpus, {**resumed, "data_path": (other,), "finetune": True}).reached == 3
    assert ran(corpus, resumed).reached == 3


# ---- several ranks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parallel", "fault", "text"),
    [
        ("context_parallel_size", "other rows", "rows of replica 0: ranks 0 read "),
        ("tensor_model_parallel_size", "other rows", "rows of replica 0: ranks 0 read "),
        ("tensor_model_parallel_size", "other token", "tokens of shard 0: ranks 0 read "),
    ],
)
def test_a_rank_that_reads_another_batch_is_named_in_the_same_step(
    corpus: str, parallel: str, fault: str, text: str
) -> None:
    sizes = {"context_parallel_size": 1, "global_batch_size": 1, parallel: 2}
    for found in run_ranks(2, run_sick, corpus, sizes, fault, 3, 0, 1):
        assert found.error.startswith(f"DataError: the batches of step 3 differ: {text}")
        assert ", ranks 1 read" in found.error


SIZES = {
    "cp": {"context_parallel_size": 2},
    "dp": {"context_parallel_size": 1},
    "tp": {"context_parallel_size": 1, "tensor_model_parallel_size": 2},
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_a_flipped_bit_in_one_copy_of_a_weight_is_named(corpus: str, sizes: dict[str, int]) -> None:
    settings = {**sizes, "check_weight_hash_across_dp_replicas_interval": 2}
    for found in run_ranks(2, run_sick, corpus, settings, "flip one copy", 3, 0, 1):
        assert found.error.startswith("LightSeqError: after step 4, the copies of decoder.layers.0.")
        assert "on ranks [0] and [1] differ" in found.error
    assert [found.error for found in run_ranks(2, run_sick, corpus, settings)] == ["", ""]


MIXED = {
    "tensor_model_parallel_size": 2,
    "context_parallel_size": 2,
    "sequence_parallel": True,
    "num_experts": 4,
    "moe_ffn_hidden_size": 48,
    "expert_model_parallel_size": 2,
    "expert_tensor_parallel_size": 1,
    "use_distributed_optimizer": True,
    "check_weight_hash_across_dp_replicas_interval": 1,
    "train_iters": 3,
}


def test_copies_are_the_same_under_every_kind_of_parallelism(corpus: str) -> None:
    assert [found.error for found in run_ranks(4, run_sick, corpus, MIXED)] == [""] * 4
