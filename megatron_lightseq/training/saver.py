"""What a run does with its folder of checkpoints: locks it, saves in it, and judges what it has saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_lightseq.config import CheckpointConfig
from megatron_lightseq.training.checkpoint.companions import take_over
from megatron_lightseq.training.checkpoint.directory import CheckpointDirectory
from megatron_lightseq.training.checkpoint.folder_lock import FolderLock
from megatron_lightseq.training.checkpoint.health_marks import mark_healthy, record_failure
from megatron_lightseq.training.checkpoint.lineage import Lineage
from megatron_lightseq.training.checkpoint.save_load import Position, RunRecord, save_checkpoint
from megatron_lightseq.training.collective import largest
from megatron_lightseq.training.job.join import Job
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

    def save(self, position: Position, losses: tuple[float, ...]) -> Path:
        """Save the state at a position; returns the checkpoint's folder. Collective.

        Args:
            position: how far the run has come.
            losses: of the last good steps.
        """
        assert self._settings.save is not None
        record = RunRecord(lineage=self._lineage, corpus=self._corpus, losses=losses)
        self.checkpoint = save_checkpoint(self._training, Path(self._settings.save), position, record)
        self._on_trial = self.checkpoint
        self.saved_at = position.iteration
        return self.checkpoint

    def end_trial(self) -> None:
        """A step was good: so is the checkpoint that it started from."""
        if self._on_trial is not None and self._job.launch.rank == 0:
            mark_healthy(self._on_trial)
        self._on_trial = None

    def record_failure(self) -> int:
        """How often the step after the checkpoint that it started from was bad; 0 if that one was good before."""
        count = 0
        if self._on_trial is not None and self._job.launch.rank == 0:
            count = record_failure(self._on_trial)
        self._on_trial = None
        return largest(count, self._job.device)

    def close(self) -> None:
        """Let another run save in the folder."""
        if self._lock is not None:
            self._lock.release()
