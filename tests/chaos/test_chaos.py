"""Faults at exact places in the real entry: each is named, the run goes on, and in the end nothing tells of them.

One run takes all faults, one per attempt, because starting ranks takes longer than everything else. The table of
many more, with times, is written by ``scripts/run_chaos.sh``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lightseq.training.checkpoint.directory import CheckpointDirectory
from tests.chaos import faults
from tests.chaos.driver import Outcome, run_plan
from tests.chaos.faults import Fault
from tests.training.launched import launch, make_corpus, train_metrics

STEPS = 56
FLAGS = {
    "train_iters": STEPS,
    "save_interval": 2,
    "save_keep_last": 3,
    "resume": "auto",
    "cp_verify_transport": True,
    "rank_silence_seconds": 3,
    "step_timeout_seconds": 4,
    "step_timeout_factor": 3,
}
PLAN = [
    Fault(kind=faults.KILL, rank=1, step=3, place=faults.FORWARD, number=3),
    Fault(kind=faults.KILL, rank=0, step=5, place=faults.BACKWARD, number=1),
    Fault(kind=faults.KILL, rank=1, step=7, place=faults.OPTIMIZER),
    Fault(kind=faults.KILL, rank=0, step=10, place=faults.SAVE, number=5),
    Fault(kind=faults.RAISE, rank=1, step=13, place=faults.FORWARD, number=2),
    Fault(kind=faults.EXIT, rank=0, step=15, place=faults.STEP),
    Fault(kind=faults.STOP, rank=1, step=17, place=faults.BACKWARD, number=2),
    Fault(kind=faults.HANG, rank=0, step=19, place=faults.FORWARD, number=1),
    Fault(kind=faults.GIL, rank=1, step=21, place=faults.OPTIMIZER),
    Fault(kind=faults.FLIP, rank=1, step=23, place=faults.FORWARD),
    Fault(kind=faults.SLOW, rank=1, step=28, place=faults.STEP, seconds=0.4),
]
CASES = [f"{fault.kind}, {fault.place}" for fault in PLAN]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def gauntlet(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run_plan(corpus, tmp_path_factory.mktemp("gauntlet"), PLAN, **FLAGS)


def test_the_run_survives_all_of_them_bit_for_bit(gauntlet: Outcome, corpus: Path, tmp_path: Path) -> None:
    assert gauntlet.status == 0, gauntlet.text
    assert not gauntlet.left
    undisturbed = launch(corpus, tmp_path, train_iters=STEPS)
    assert undisturbed.wait() == 0, undisturbed.text()
    ours, theirs = train_metrics(gauntlet.folder), train_metrics(tmp_path)
    assert [(m.step, m.loss, m.grad_norm) for m in ours] == [(m.step, m.loss, m.grad_norm) for m in theirs]
    names = {path.name for path in (gauntlet.folder / "checkpoints").iterdir()}
    assert not [name for name in names if ".tmp" in name]
    assert (
        CheckpointDirectory(root=gauntlet.folder / "checkpoints").candidates()[0].name == f"iter_{STEPS:07d}"
    )


@pytest.mark.parametrize("number", range(len(PLAN)), ids=CASES)
def test_every_fault_is_named(gauntlet: Outcome, number: int) -> None:
    seen = gauntlet.attempts[number]
    assert seen.fired is not None, gauntlet.text
    if seen.fault is not None and seen.fault.kind == faults.SLOW:
        assert f"WARNING: rank {seen.fault.rank} on " in gauntlet.text
        return
    if seen.fault is not None and seen.fault.kind == faults.FLIP:
        assert "with other bytes than were sent" in seen.error
    assert seen.names_the_rank, (seen, gauntlet.text)
    assert seen.names_the_place, seen
    assert f"attempt {number} failed: {seen.rank} failed at step {seen.step} ({seen.where})" in gauntlet.text
    assert seen.ended_s is not None
    assert seen.ended_s < 45.0


def test_the_last_lines_say_what_the_faults_have_cost(gauntlet: Outcome) -> None:
    assert "goodput" in gauntlet.text
    assert "repeated steps" in gauntlet.text
