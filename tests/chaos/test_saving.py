"""Saves that fail, that go on in the background, or both: the run goes on, and no checkpoint is lost or torn."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_lightseq.training.checkpoint.directory import CheckpointDirectory
from tests.chaos.sick_runs import Ran, run_sick
from tests.harness.ranks import run_ranks
from tests.training.launched import make_corpus

SAVING = {"save_interval": 2, "train_iters": 7, "async_save": True}
MODES = {"in the background": True, "at once": False}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_corpus(tmp_path_factory.mktemp("corpus")))


@pytest.fixture(scope="module")
def whole(corpus: str) -> Ran:
    """Without saving."""
    found: Ran = run_ranks(1, run_sick, corpus, {"train_iters": 7})[0]
    return found


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name.startswith("iter_"))


def slowly(corpus: str, overrides: dict[str, Any]) -> Ran:
    """Every save of the background takes longer than a step, so that training goes on meanwhile."""
    from megatron_lightseq.training.checkpoint import saving

    fsync = saving.fsync_files

    def late(*arguments: Any) -> None:
        time.sleep(0.5)
        fsync(*arguments)

    saving.fsync_files = late
    try:
        return run_sick(corpus, overrides)
    finally:
        saving.fsync_files = fsync


@pytest.mark.parametrize(
    "sizes", [{}, {"context_parallel_size": 2, "use_distributed_optimizer": True}], ids=str
)
def test_a_save_in_the_background_holds_the_state_of_its_step(
    corpus: str, tmp_path: Path, sizes: dict[str, Any]
) -> None:
    """Weights change while they are written, and what is written must not."""
    ranks = 2 if sizes else 1
    settings = {**sizes, **SAVING, "save": str(tmp_path)}
    saved = run_ranks(ranks, slowly, corpus, settings)[0]
    assert names(tmp_path) == [f"iter_{step:07d}" for step in (2, 4, 6, 7)]
    assert [text for text in saved.notes if text.startswith("saving step 2 in the background, copied in")]
    assert sum(text.startswith("saved ") for text in saved.notes) == 4
    for step in (2, 4, 6):
        again = {**sizes, "train_iters": 7, "load": str(tmp_path), "load_iteration": step, "save": None}
        resumed = run_ranks(ranks, run_sick, corpus, again)[0]
        assert (resumed.reached, resumed.weights) == (7, saved.weights), step


def test_a_background_save_is_healthy_once_a_step_was_good(corpus: str, tmp_path: Path) -> None:
    run_ranks(1, slowly, corpus, {**SAVING, "save": str(tmp_path)})
    marked = [name for name in names(tmp_path) if (tmp_path / name / "healthy").exists()]
    assert marked == [f"iter_{step:07d}" for step in (2, 4, 6)]


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_nothing_is_saved_that_is_not_finite(corpus: str, tmp_path: Path, mode: bool) -> None:
    settings = {**SAVING, "async_save": mode, "save": str(tmp_path)}
    found = run_ranks(1, run_sick, corpus, settings, "nan before save", 4)[0]
    assert found.error.startswith("SpoiledStateError: not saved: ")
    assert "mlp.linear_fc1" in found.error
    assert names(tmp_path) == ["iter_0000002"]


def failing(corpus: str, overrides: dict[str, Any], number: int, code: int, at: int = 4) -> Ran:
    """One file operation of the save after a step fails; ``number`` counts them from 0."""
    from megatron_lightseq.training import saver

    state = {"seen": -1, "armed": False}

    def operation() -> None:
        if state["armed"]:
            state["seen"] += 1
            if state["seen"] == number:
                raise OSError(code, os.strerror(code))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if (event == "open" and "iter_" in str(arguments[0])) or event == "os.rename":
            operation()

    if not hasattr(sys, "_mls_file_hook"):
        sys.addaudithook(lambda event, arguments: sys._mls_file_hook(event, arguments))  # type: ignore[attr-defined]
    sys._mls_file_hook = hook  # type: ignore[attr-defined]
    fsync, save = os.fsync, saver.Saver.save

    def synced(descriptor: int) -> None:
        operation()
        fsync(descriptor)

    def armed(self: Any, position: Any, *arguments: Any, **settings: Any) -> None:
        self.settle()
        state["armed"] = position.iteration == at
        save(self, position, *arguments, **settings)

    os.fsync, saver.Saver.save = synced, armed  # type: ignore[method-assign]
    try:
        return run_sick(corpus, overrides)
    finally:
        os.fsync, saver.Saver.save = fsync, save  # type: ignore[method-assign]
        sys._mls_file_hook = lambda *_: None  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("number", [0, 2, 5, 9, 13, 16, 18, 20])
def test_a_failed_save_is_reported_and_training_goes_on(
    corpus: str, tmp_path: Path, whole: Ran, mode: bool, number: int
) -> None:
    settings = {**SAVING, "async_save": mode, "save": str(tmp_path)}
    found = run_ranks(1, failing, corpus, settings, number, errno.ENOSPC)[0]
    assert (found.error, found.reached, found.weights) == ("", 7, whole.weights)
    (warning,) = [text for text in found.notes if text.startswith("WARNING")]
    assert warning.startswith("WARNING: no checkpoint was saved, and training goes on: saving to ")
    assert "OSError: [Errno 28] No space left on device" in warning
    check_folder(tmp_path)


def check_folder(root: Path) -> None:
    """Nothing half-written is left, and the last save is there; the failed one may be, if only its names failed."""
    left = {path.name for path in root.iterdir()}
    assert not [name for name in left if ".tmp" in name], left
    assert {"iter_0000002", "iter_0000006", "iter_0000007"} <= left
    folder = CheckpointDirectory(root=root)
    assert folder.candidates()[0].name == "iter_0000007"
    assert folder.clean() == []


def test_the_last_save_must_succeed(corpus: str, tmp_path: Path) -> None:
    settings = {**SAVING, "save": str(tmp_path)}
    found = run_ranks(1, failing, corpus, settings, 3, errno.EIO, 7)[0]
    assert found.error.startswith("CheckpointError: saving to ")
    assert "Input/output error" in found.error
    assert names(tmp_path) == [f"iter_{step:07d}" for step in (2, 4, 6)]


def on_a_full_disk(corpus: str, overrides: dict[str, Any]) -> Ran:
    """There are 1,000 bytes free after step 2."""
    import shutil

    usage: Callable[[Any], Any] = shutil.disk_usage
    seen = {"calls": 0}

    def full(path: Any) -> Any:
        seen["calls"] += 1
        return usage(path)._replace(free=1000) if seen["calls"] == 2 else usage(path)

    shutil.disk_usage = full  # type: ignore[assignment]
    try:
        return run_sick(corpus, overrides)
    finally:
        shutil.disk_usage = usage  # type: ignore[assignment]


def test_what_does_not_fit_is_not_begun(corpus: str, tmp_path: Path, whole: Ran) -> None:
    found = run_ranks(1, on_a_full_disk, corpus, {**SAVING, "save": str(tmp_path)})[0]
    assert (found.reached, found.weights) == (7, whole.weights)
    (warning,) = [text for text in found.notes if text.startswith("WARNING")]
    assert "1,000 bytes are free for --save" in warning
    assert "and the checkpoint has " in warning
    assert names(tmp_path) == [f"iter_{step:07d}" for step in (2, 6, 7)]
