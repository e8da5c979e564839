"""The training loop: steps, evaluations, checkpoints, and orderly stops."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_lightseq.config import CheckpointConfig, PretrainConfig, ResolvedConfig
from megatron_lightseq.config.accounting import step_flops
from megatron_lightseq.errors import CheckpointError
from megatron_lightseq.training.checkpoint.companions import take_over
from megatron_lightseq.training.checkpoint.directory import CheckpointDirectory
from megatron_lightseq.training.checkpoint.folder_lock import FolderLock
from megatron_lightseq.training.checkpoint.health_marks import (
    FAILURES_OF_A_SUSPECT,
    mark_healthy,
    record_failure,
)
from megatron_lightseq.training.checkpoint.lineage import Lineage
from megatron_lightseq.training.checkpoint.random_state import restore_random_state
from megatron_lightseq.training.checkpoint.save_load import (
    Position,
    Resumed,
    RunRecord,
    load_checkpoint,
    save_checkpoint,
)
from megatron_lightseq.training.data.datasets import Corpora, Datasets, build_datasets
from megatron_lightseq.training.data.loaders import train_iterator, valid_iterator
from megatron_lightseq.training.data.rows import DataShare
from megatron_lightseq.training.health.guard import ROLLBACK, STOP, WARN, Fault, StepGuard
from megatron_lightseq.training.health.judge import LossWindow
from megatron_lightseq.training.health.weights import check_replicas
from megatron_lightseq.training.job.failure import EVALUATE, FINISH, SAVE, SET_UP, TRAIN
from megatron_lightseq.training.job.join import Job
from megatron_lightseq.training.job.signals import StopRequest
from megatron_lightseq.training.reporting.memory import peak_resident_bytes
from megatron_lightseq.training.reporting.metrics import MetricsLog, TrainMetrics, ValidationMetrics
from megatron_lightseq.training.reporting.progress import Progress, Stopwatch, choose_display, duration
from megatron_lightseq.training.reporting.report import Outcome, header
from megatron_lightseq.training.setup import Training, build_training
from megatron_lightseq.training.step import StepResult, evaluate
from megatron_lightseq.transport.group import rank_in

RUNNING, OUT_OF_TIME, ASKED_TO_STOP = range(3)


class Loop:
    """One run on one rank; :meth:`run` is collective over all ranks."""

    def __init__(self, job: Job, training: Training, corpora: Corpora, stop: StopRequest) -> None:
        self._job = job
        self._training = training
        self._config = training.config
        self._corpora = corpora
        self._stop = stop
        self._deadline = _deadline(self._config.training.exit_duration_in_mins)
        self._position = Position(iteration=0, consumed_samples=0)
        self._resumed_from = 0
        self._checkpoint: Path | None = None
        self._lineage = Lineage.fresh()
        """Of rank 0, which writes manifests."""
        self._lock: FolderLock | None = None
        self._saved_at: int | None = None
        """The step whose state was saved last."""
        self._flops = step_flops(training.config, training.padded_vocab_size)
        self._guard = StepGuard(training)
        self._bad_steps = 0
        """In a row."""
        self._on_trial: Path | None = None
        """The checkpoint of this run's folder that the next step starts from, until that step was good."""
        self._iterators: list[Iterator[Any]] = []

    def run(self) -> Outcome:
        """Load, train, evaluate, save."""
        datasets = self._prepare()
        steps = self._config.training.train_iters
        progress = self._make_progress()
        log = self._make_log()
        began, why = time.perf_counter(), RUNNING
        try:
            progress.table(header(self._training, self._corpora, self._job))
            if self._resumed_from:
                progress.note(f"resumed from {self._checkpoint} at step {self._resumed_from}")
            while self._position.iteration < steps and why == RUNNING:
                step = self._position.iteration + 1
                fault = self._one_step(step, progress, log)
                if fault is not None and not self._go_on_after(fault, step, datasets, progress, log):
                    continue
                self._compare_copies_if_due(step)
                self._evaluate_if_due(step, datasets, progress, log)
                self._save_if_due(step, progress)
                why = self._agree_to_stop()
            seconds = time.perf_counter() - began
            self._save_at_end(progress)
        finally:
            progress.close()
            log.close()
            if self._lock is not None:
                self._lock.release()
        self._job.channel.enter(self._position.iteration, FINISH)
        return Outcome(
            position=self._position,
            resumed_from=self._resumed_from,
            stopped=self._reason(why) if self._position.iteration < steps else None,
            checkpoint=self._checkpoint,
            metrics_path=log.path,
            seconds=seconds,
        )

    # ---- before the first step --------------------------------------------------------------------------------

    def _prepare(self) -> Datasets:
        datasets = build_datasets(self._config, self._corpora)
        folder = self._own_folder()
        if folder is not None:
            self._lock = folder.lock()
            folder.clean()
        restarted = self._largest(self._job.launch.attempt) > 0  # each machine counts its own restarts
        settings = self._load_settings(restarted)
        random = None
        if settings.load is not None:
            resumed = self._load(settings)
            self._position, random = resumed.position, resumed.random
            self._resumed_from = resumed.position.iteration
            if not settings.finetune:
                self._lineage = resumed.lineage.continued(resumed.position.iteration)
        if folder is not None:
            self._lineage = (folder.started() if restarted else None) or self._lineage
            folder.start(self._lineage)
            if settings.load is not None:
                take_over(Path(settings.load), folder.root)
        self._start_reading(datasets, random)
        return datasets

    def _load(self, settings: CheckpointConfig, *, healthy: bool = False) -> Resumed:
        """Restore the training state and what steps are judged by; neither the position nor random states."""
        assert settings.load is not None
        root = Path(settings.load)
        resumed = load_checkpoint(
            self._training, root, settings, corpus=self._corpora.identity, healthy=healthy
        )
        self._checkpoint = resumed.folder
        self._guard.window = LossWindow(resumed.losses)
        own = self._config.checkpoint.save
        in_own_folder = own is not None and Path(own).resolve() == root.resolve()
        self._on_trial = resumed.folder if in_own_folder and not settings.finetune else None
        return resumed

    def _start_reading(self, datasets: Datasets, random: dict[str, Any] | None) -> None:
        """Iterators from the present position on, then the random states that belong there."""
        consumed = self._position.consumed_samples
        self._iterators = [
            train_iterator(self._config, datasets, share_of(self._training), consumed_samples=consumed)
            for _ in self._training.chunks
        ]
        if random is not None:
            restore_random_state(random)

    def _load_settings(self, restarted: bool) -> CheckpointConfig:
        """What to load; after a restart by torchrun, everything that this run has saved so far."""
        settings, folder = self._config.checkpoint, self._own_folder()
        if settings.resume == "auto":
            saved = folder is not None and bool(folder.candidates())
        else:
            saved = restarted and folder is not None and bool(folder.of_this_run())
        if not self._largest(int(saved)):
            return settings
        return self._own_checkpoints()

    def _own_checkpoints(self) -> CheckpointConfig:
        """To load what this run has saved."""
        settings = self._config.checkpoint
        return CheckpointConfig(
            save=settings.save,
            load=settings.save,
            strict_load=settings.strict_load,
            data_may_change=settings.data_may_change,
        )

    def _own_folder(self) -> CheckpointDirectory | None:
        """The folder to save in, on the rank that looks after it; else None."""
        save = self._config.checkpoint.save
        return None if save is None or self._job.launch.rank > 0 else CheckpointDirectory(root=Path(save))

    def _largest(self, number: int) -> int:
        """The largest of the ranks' numbers. Collective."""
        largest = torch.tensor(number, device=self._job.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest.item())

    def _make_progress(self) -> Progress:
        first, steps = self._position.iteration, self._config.training.train_iters
        display = choose_display(
            self._config.logging.progress, rank=self._job.launch.rank, first_step=first, num_steps=steps
        )
        return Progress(
            display, first_step=first, num_steps=steps, log_interval=self._config.training.log_interval
        )

    def _make_log(self) -> MetricsLog:
        logging = self._config.logging
        if self._job.launch.rank != 0:
            return MetricsLog(folder=None, tensorboard=None)
        folder = logging.report_dir or self._config.checkpoint.save
        return MetricsLog(
            folder=None if folder is None else Path(folder),
            tensorboard=None if logging.tensorboard_dir is None else Path(logging.tensorboard_dir),
            resumed_step=self._position.iteration,
        )

    # ---- steps ------------------------------------------------------------------------------------------------

    def _one_step(self, step: int, progress: Progress, log: MetricsLog) -> Fault | None:
        self._job.channel.enter(step, TRAIN)
        watch = Stopwatch()
        exposed = self._training.attention_stats.exposed_seconds
        result, fault = self._guard.step(step, self._iterators)
        seconds = watch.lap()
        exposed = self._training.attention_stats.exposed_seconds - exposed
        batch = self._config.training.global_batch_size
        self._position = Position(iteration=step, consumed_samples=self._position.consumed_samples + batch)
        if fault is None:
            self._bad_steps = 0
            self._end_trial()
        metrics = self._measure(result, seconds, exposed)
        log.write(metrics)
        progress.step(metrics)
        return fault

    def _end_trial(self) -> None:
        """A step was good: so is the checkpoint that it started from."""
        if self._on_trial is not None and self._job.launch.rank == 0:
            mark_healthy(self._on_trial)
        self._on_trial = None

    def _compare_copies_if_due(self, step: int) -> None:
        interval = self._config.health.check_weight_hash_across_dp_replicas_interval
        if interval is not None and step % interval == 0:
            check_replicas(self._training, step)

    # ---- bad steps --------------------------------------------------------------------------------------------

    def _go_on_after(
        self, fault: Fault, step: int, datasets: Datasets, progress: Progress, log: MetricsLog
    ) -> bool:
        """Do what the configuration says about a bad step; whether the run goes on behind it.

        Otherwise the run has gone back to an earlier checkpoint, because the one it had started from is spoiled.

        Raises:
            LightSeqError: the run ends with this step.
        """
        progress.note(f"WARNING: {fault.text}")
        if fault.action == WARN:
            return True
        failures = self._record_failure()
        self._bad_steps += 1
        if failures >= FAILURES_OF_A_SUSPECT:
            self._fall_back(fault, datasets, progress, log)
            return False
        if fault.action == STOP or self._bad_steps > self._config.health.max_bad_steps:
            raise fault.error()
        if fault.action == ROLLBACK:
            self._roll_back(fault, progress)
        progress.note(f"step {step} is left out: its batch is skipped")
        return True

    def _record_failure(self) -> int:
        """How often the step after the checkpoint that it started from was bad; 0 if that one was good before."""
        count = 0
        if self._on_trial is not None and self._job.launch.rank == 0:
            count = record_failure(self._on_trial)
        self._on_trial = None
        return self._largest(count)

    def _roll_back(self, fault: Fault, progress: Progress) -> None:
        """Take the state of the newest healthy checkpoint, keep the position, and save, so that a restart finds it."""
        try:
            resumed = self._load(self._own_checkpoints(), healthy=True)
        except CheckpointError as error:
            raise fault.error() from error
        if resumed.random is not None:
            restore_random_state(resumed.random)
        progress.note(f"rolled back to the weights of {resumed.folder}")
        self._save(progress)

    def _fall_back(self, fault: Fault, datasets: Datasets, progress: Progress, log: MetricsLog) -> None:
        """Start again from the checkpoint before one whose next step has failed twice."""
        try:
            resumed = self._load(self._own_checkpoints())
        except CheckpointError as error:
            raise fault.error() from error
        self._position = resumed.position
        self._saved_at, self._bad_steps = None, 0
        self._start_reading(datasets, resumed.random)
        log.rewind(resumed.position.iteration)
        progress.note(f"resumed from {resumed.folder} at step {resumed.position.iteration}")

    def _measure(self, result: StepResult, seconds: float, exposed_seconds: float) -> TrainMetrics:
        training = self._config.training
        tokens = training.seq_length * training.global_batch_size
        return TrainMetrics(
            step=self._position.iteration,
            loss=result.loss,
            grad_norm=result.grad_norm,
            learning_rate=result.learning_rate,
            tokens_per_second=tokens / seconds,
            step_seconds=seconds,
            tflops_per_rank=self._flops / seconds / dist.get_world_size() / 1e12,
            memory_bytes=peak_memory(self._job.device),
            exposed_communication=exposed_seconds / seconds,
            consumed_samples=self._position.consumed_samples,
            skipped=result.skipped,
            mtp_loss=result.mtp_loss,
            load_balancing_loss=result.load_balancing_loss,
        )

    def _evaluate_if_due(self, step: int, datasets: Datasets, progress: Progress, log: MetricsLog) -> None:
        training = self._config.training
        if training.eval_interval is None or step % training.eval_interval:
            return
        self._job.channel.enter(step, EVALUATE)
        iterators = [
            valid_iterator(self._config, datasets, share_of(self._training)) for _ in self._training.chunks
        ]
        result = evaluate(
            self._training, iterators, training.eval_iters, lambda: self._agree_to_stop() != RUNNING
        )
        if not result.complete:  # the loop stops next
            progress.note(f"validation after step {step} was interrupted")
            return
        log.write(ValidationMetrics(step=step, loss=result.loss, num_tokens=result.num_tokens))
        progress.note(f"validation loss after step {step}: {result.loss:.4f} ({result.num_tokens:,} tokens)")

    def _save_if_due(self, step: int, progress: Progress) -> None:
        interval = self._config.checkpoint.save_interval
        if interval is not None and step % interval == 0:
            self._save(progress)

    def _save_at_end(self, progress: Progress) -> None:
        if self._saved_at != self._position.iteration:
            self._save(progress)

    def _save(self, progress: Progress) -> None:
        if self._config.checkpoint.save is None:
            return
        self._job.channel.enter(self._position.iteration, SAVE)
        watch = Stopwatch()
        root = Path(self._config.checkpoint.save)
        record = RunRecord(
            lineage=self._lineage, corpus=self._corpora.identity, losses=self._guard.window.losses
        )
        self._checkpoint = save_checkpoint(self._training, root, self._position, record)
        self._on_trial = self._checkpoint
        self._saved_at = self._position.iteration
        progress.note(f"saved {self._checkpoint} in {duration(watch.lap())}")

    # ---- stopping ---------------------------------------------------------------------------------------------

    def _agree_to_stop(self) -> int:
        """The most important reason of any rank to stop after this step: a signal may reach only one rank."""
        own = ASKED_TO_STOP if self._stop else OUT_OF_TIME if time.monotonic() > self._deadline else RUNNING
        return self._largest(own)

    def _reason(self, why: int) -> str:
        if why == OUT_OF_TIME:
            return f"exit_duration_in_mins ({self._config.training.exit_duration_in_mins}) has passed"
        if self._stop.signal is not None:
            return f"received {self._stop.signal.name}"
        return "another rank was asked to stop"


def build_loop(
    job: Job, config: PretrainConfig | ResolvedConfig, corpora: Corpora, stop: StopRequest
) -> Loop:
    """Model, optimizer and loop for a configuration."""
    job.channel.enter(0, SET_UP)
    return Loop(job, build_training(config, vocab_size=corpora.vocab_size), corpora, stop)


def share_of(training: Training) -> DataShare:
    """Which part of the data this rank reads."""
    groups = training.groups
    return DataShare(
        rank=rank_in(groups.dp),
        size=training.sizes.data,
        layout=training.layout,
        cp_rank=rank_in(groups.cp),
    )


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process in bytes: resident memory on a CPU, memory allocated by torch on a GPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return peak_resident_bytes()


def _deadline(minutes: float | None) -> float:
    return math.inf if minutes is None else time.monotonic() + 60 * minutes
