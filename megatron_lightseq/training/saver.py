"""What a run does with its folder of checkpoints: locks it, saves in it, and judges what it has saved.

A save on the way that fails is reported, and the run goes on; the last one must succeed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_lightseq.config import CheckpointConfig
from megatron_lightseq.errors import CheckpointError, SpoiledStateError
from megatron_lightseq.training.checkpoint.background import BackgroundSave
from megatron_lightseq.training.checkpoint.companions import take_over
from megatron_lightseq.training.checkpoint.directory import CheckpointDirectory
from megatron_lightseq.training.checkpoint.folder_lock import FolderLock
from megatron_lightseq.training.checkpoint.health_marks import mark_healthy, record_failure
from megatron_lightseq.training.checkpoint.host_copies import HostCopies
from megatron_lightseq.training.checkpoint.lineage import Lineage
from megatron_lightseq.training.checkpoint.saving import save_checkpoint, take_snapshot, write_snapshot
from megatron_lightseq.training.checkpoint.state import Position, RunRecord
from megatron_lightseq.training.collective import largest
from megatron_lightseq.training.job.join import Job
from megatron_lightseq.training.reporting.progress import duration
from megatron_lightseq.training.setup import Training


class Saver:
    """One rank's part in saving a run. Rank 0 looks after the folder."""

    def __init__(self, job: Job, training: Training, corpus: Mapping[str, Any]) -> None:
        self._job = job
        self._training = training
        self._settings = training.config.checkpoint
        self._corpus = corpus
        save = self._settings.save
        self._folder = None if save is None or job.launch.rank > 0 else CheckpointDirectory(root=Path(save))
        self._lock: FolderLock | None = None
        self._lineage = Lineage.fresh()
        self._tell: Callable[[str], None] = lambda _: None
        self._background: BackgroundSave | None = None
        """The save that is under way; on all ranks or on none."""
        self._copies = HostCopies()
        self._group = (
            dist.new_group(backend="gloo") if self._settings.async_save and save is not None else None
        )
        """Of the threads that save: their collectives must not mix with those of training."""
        self._has_saved = self._was_good = False
        """The latter: a step was good since the state was copied that is being written."""
        self._on_trial: Path | None = None
        """The checkpoint of this run's folder that the next step starts from, until that step was good."""
        self.checkpoint: Path | None = None
        """The one that was saved or loaded last."""
        self.saved_at: int | None = None
        """The step whose state was saved last."""

    def open(self) -> None:
        """Lock the folder, and remove what killed saves have left.

        Raises:
            CheckpointError: another run saves in the folder, or it cannot be written to.
        """
        if self._folder is not None:
            self._lock = self._folder.lock()
            self._folder.clean()

    def what_to_load(self, restarted: bool) -> CheckpointConfig:
        """What to load; after a restart by torchrun, everything that this run has saved so far. Collective."""
        if self._settings.resume == "auto":
            saved = self._folder is not None and bool(self._folder.candidates())
        else:
            saved = restarted and self._folder is not None and bool(self._folder.of_this_run())
        return self.own_checkpoints() if largest(int(saved), self._job.device) else self._settings

    def own_checkpoints(self) -> CheckpointConfig:
        """To load what this run has saved."""
        settings = self._settings
        return CheckpointConfig(
            save=settings.save,
            load=settings.save,
            strict_load=settings.strict_load,
            data_may_change=settings.data_may_change,
        )

    def loaded(self, folder: Path, settings: CheckpointConfig) -> None:
        """Training goes on from a checkpoint, which ``settings`` have named."""
        own, root = self._settings.save, folder.parent
        in_own_folder = own is not None and Path(own).resolve() == root.resolve()
        self.checkpoint = folder
        self._on_trial = folder if in_own_folder and not settings.finetune else None

    def begin(self, lineage: Lineage, *, restarted: bool, loaded_from: str | None) -> None:
        """Everything is loaded: from here on, what is saved belongs to this run."""
        self._lineage = lineage
        if self._folder is None:
            return
        self._lineage = (self._folder.started() if restarted else None) or lineage
        self._folder.start(self._lineage)
        if loaded_from is not None:
            take_over(Path(loaded_from), self._folder.root)

    def is_due(self, step: int) -> bool:
        """Whether the configuration asks for a checkpoint after this step."""
        interval = self._settings.save_interval
        return interval is not None and step % interval == 0

    def report_to(self, tell: Callable[[str], None]) -> None:
        """Where to say what was saved, and what was not."""
        self._tell = tell

    def save(self, position: Position, losses: tuple[float, ...], *, is_last: bool = False) -> None:
        """Save the state at a position, or begin to. Collective.

        Args:
            position: how far the run has come.
            losses: of the last good steps.
            is_last: wait for it, and raise what goes wrong.

        Raises:
            SpoiledStateError: the state is not finite.
            CheckpointError: the last save has failed.
        """
        began = time.perf_counter()
        self.settle()
        root = Path(self._settings.save or "")
        record = RunRecord(lineage=self._lineage, corpus=self._corpus, losses=losses)
        self.saved_at = position.iteration
        if self._group is None or is_last:
            self._finish(
                lambda: save_checkpoint(self._training, root, position, record), began, is_last=is_last
            )
            return
        snapshot = take_snapshot(self._training, position, record, self._copies, is_checked=self._has_saved)
        self._background = BackgroundSave(lambda: write_snapshot(snapshot, self._training, root, self._group))
        self._has_saved, self._was_good = True, False
        self._tell(f"saving step {position.iteration} in the background, copied in {duration(_since(began))}")

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread is writing."""
        return self._background is not None and self._background.is_running

    def settle(self) -> None:
        """Wait for the save that is under way, if there is one, and take note of how it went. Collective.

        Raises:
            SpoiledStateError: the copied state was not finite.
        """
        if self._background is None:
            return
        background, self._background = self._background, None
        self._finish(background.result)
        if self._was_good:
            self.end_trial()

    def _finish(self, save: Callable[[], Path], began: float | None = None, *, is_last: bool = False) -> None:
        try:
            self.checkpoint = self._on_trial = save()
        except CheckpointError as error:
            self.saved_at = None
            if self._folder is not None:
                with contextlib.suppress(OSError):
                    self._folder.clean()
            if is_last or isinstance(error, SpoiledStateError):
                raise
            self._tell(f"WARNING: no checkpoint was saved, and training goes on: {error}")
            return
        self._tell(f"saved {self.checkpoint}" + ("" if began is None else f" in {duration(_since(began))}"))

    def end_trial(self) -> None:
        """A step was good: so is the checkpoint that it started from."""
        self._was_good = True
        if self._on_trial is not None and self._job.launch.rank == 0:
            mark_healthy(self._on_trial)
        self._on_trial = None

    def record_failure(self) -> int:
        """How often the step after the checkpoint that it started from was bad; 0 if that one was good before."""
        self.settle()
        count = 0
        if self._on_trial is not None and self._job.launch.rank == 0:
            count = record_failure(self._on_trial)
        self._on_trial = None
        return largest(count, self._job.device)

    def close(self) -> None:
        """Let another run save in the folder."""
        if self._lock is not None:
            self._lock.release()


def _since(began: float) -> float:
    return time.perf_counter() - began
