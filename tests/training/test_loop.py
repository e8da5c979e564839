from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

from megatron_lightseq.training.checkpoint.directory import CheckpointDirectory
from megatron_lightseq.training.checkpoint.lineage import Lineage
from tests.harness.ranks import RankError, run_ranks
from tests.training.launched import FLAGS, make_corpus

ALONE = {**FLAGS, "context_parallel_size": 1, "train_iters": 2, "progress": "off"}


def looped(corpus: str, overrides: dict[str, Any], attempt: int = 0) -> tuple[int, int, str | None]:
    """Run the loop on this rank. Returns the steps it started from and reached, and the checkpoint it reports."""
    warnings.simplefilter("ignore")
    import torch
    from megatron.core import parallel_state

    from megatron_lightseq.config import PretrainConfig, with_values
    from megatron_lightseq.megatron.cpu import platform as cpu_platform
    from megatron_lightseq.training.data.datasets import open_corpora
    from megatron_lightseq.training.job.control_channel import ControlChannel
    from megatron_lightseq.training.job.join import Job
    from megatron_lightseq.training.job.launch import Launch
    from megatron_lightseq.training.job.signals import StopRequest
    from megatron_lightseq.training.loop import build_loop

    cpu_platform.activate()
    config = with_values(PretrainConfig(), **{**ALONE, "data_path": (corpus,), **overrides})
    channel = ControlChannel(lambda: None, rank=0, world_size=1)  # type: ignore[arg-type, return-value]
    job = Job(
        launch=Launch(attempt=attempt),
        channel=channel,
        device=torch.device("cpu"),
        backend="gloo",
        kernel="reference",
    )
    try:
        outcome = build_loop(job, config, open_corpora(config), StopRequest()).run()
    finally:
        parallel_state.destroy_model_parallel()
    checkpoint = None if outcome.checkpoint is None else str(outcome.checkpoint)
    return outcome.resumed_from, outcome.position.iteration, checkpoint


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_corpus(tmp_path_factory.mktemp("corpus")))


def saved(root: Path) -> list[str]:
    return [path.name for path in CheckpointDirectory(root=root).candidates()]


def test_finetuning_for_as_many_steps_as_were_trained_saves_what_it_learned(
    corpus: str, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert run_ranks(1, looped, corpus, {"save": str(first)})[0] == (0, 2, str(first / "iter_0000002"))
    tuned = run_ranks(1, looped, corpus, {"load": str(first), "save": str(second), "finetune": True})[0]
    assert tuned == (0, 2, str(second / "iter_0000002"))
    assert saved(second) == ["iter_0000002"]


def test_restarted_ranks_go_on_with_their_own_run_only(corpus: str, tmp_path: Path) -> None:
    """A run that failed before its first save must not resume from an earlier run in the same folder."""
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    run_ranks(1, looped, corpus, {"save": first})
    CheckpointDirectory(root=tmp_path / "first").start(Lineage.fresh())  # and it fails immediately
    assert run_ranks(1, looped, corpus, {"save": first}, 1)[0][:2] == (0, 2)
    # Finetuning resumes where it stopped; it does not start again.
    tune = {"load": first, "save": second, "finetune": True, "save_interval": 1}
    run_ranks(1, looped, corpus, tune)
    shutil.rmtree(tmp_path / "second" / "iter_0000002")
    assert run_ranks(1, looped, corpus, tune, 1)[0] == (1, 2, f"{second}/iter_0000002")


def test_one_command_starts_and_resumes_a_run_and_keeps_the_checkpoints_it_is_asked_to(
    corpus: str, tmp_path: Path
) -> None:
    command = {"save": str(tmp_path), "save_interval": 1, "save_keep_last": 2, "resume": "auto"}
    run_ranks(1, looped, corpus, {**command, "train_iters": 3})
    assert saved(tmp_path) == ["iter_0000003", "iter_0000002"]
    assert run_ranks(1, looped, corpus, {**command, "train_iters": 4})[0][:2] == (3, 4)
    assert saved(tmp_path) == ["iter_0000004", "iter_0000003"]
    chosen = {"load": str(tmp_path), "load_iteration": 3, "train_iters": 4}
    assert run_ranks(1, looped, corpus, chosen)[0][:2] == (3, 4)
    with pytest.raises(
        RankError, match=r"no checkpoint of step 7 in .*has checkpoints of the steps \[3, 4\]"
    ):
        run_ranks(1, looped, corpus, {**chosen, "load_iteration": 7})


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(
    corpus: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        RankError, match=r"CheckpointError: --save .*/file: .*Choose a folder that this user may"
    ):
        run_ranks(1, looped, corpus, {"save": str(tmp_path / "file"), "train_iters": 10**6})
