"""The training loop: steps, evaluations, checkpoints, and orderly stops."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from megatron_lightseq.config import CheckpointConfig, PretrainConfig, ResolvedConfig
from megatron_lightseq.config.accounting import step_flops
from megatron_lightseq.errors import CheckpointError
from megatron_lightseq.training.checkpoint.health_marks import FAILURES_OF_A_SUSPECT
from megatron_lightseq.training.checkpoint.lineage import Lineage
from megatron_lightseq.training.checkpoint.loading import Resumed, load_checkpoint
from megatron_lightseq.training.checkpoint.random_state import restore_random_state
from megatron_lightseq.training.checkpoint.state import Position
from megatron_lightseq.training.collective import all_largest, largest
from megatron_lightseq.training.data.datasets import Corpora, Datasets, build_datasets
from megatron_lightseq.training.data.loaders import train_iterator, valid_iterator
from megatron_lightseq.training.data.rows import DataShare
from megatron_lightseq.training.health.guard import ROLLBACK, STOP, WARN, Fault, StepGuard
from megatron_lightseq.training.health.judge import LossWindow
from megatron_lightseq.training.health.stragglers import Straggler, watch_ranks
from megatron_lightseq.training.health.weights import check_replicas
from megatron_lightseq.training.job.failure import EVALUATE, FINISH, SAVE, SET_UP, TRAIN
from megatron_lightseq.training.job.join import Job
from megatron_lightseq.training.job.signals import StopRequest
from megatron_lightseq.training.packed_batches import prepared_ahead
from megatron_lightseq.training.reporting.memory import peak_resident_bytes
from megatron_lightseq.training.reporting.metrics import (
    Attempt,
    MetricsLog,
    SaveMetrics,
    TrainMetrics,
    ValidationMetrics,
)
from megatron_lightseq.training.reporting.progress import Progress, Stopwatch, choose_display
from megatron_lightseq.training.reporting.report import Outcome, header
from megatron_lightseq.training.reporting.wandb_run import WandbRun
from megatron_lightseq.training.saver import Saver
from megatron_lightseq.training.setup import Training, build_training
from megatron_lightseq.training.step import StepResult, evaluate
from megatron_lightseq.training.tracing.window import Tracing
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
        self._saver = Saver(job, training, corpora.identity)
        self._flops = step_flops(training.config, training.padded_vocab_size)
        self._guard = StepGuard(training)
        self._watch = watch_ranks(training)
        self._stragglers: list[Straggler] = []
        self._tracing = Tracing(training)
        self._bad_steps = 0
        """In a row."""
        self._iterators: list[Iterator[Any]] = []
        self._step_s = self._busy_s = 0.0
        """Of the last step: its time, and this rank's own work in it."""

    def run(self) -> Outcome:
        """Load, train, evaluate, save."""
        datasets = self._prepare()
        steps = self._config.training.train_iters
        progress = self._make_progress()
        log = self._make_log()
        self._saver.report_to(progress.note)
        began, why = time.perf_counter(), RUNNING
        try:
            log.write(self._attempt())
            progress.table(header(self._training, self._corpora, self._job))
            if self._resumed_from:
                progress.note(f"resumed from {self._saver.checkpoint} at step {self._resumed_from}")
            while self._position.iteration < steps and why == RUNNING:
                step = self._position.iteration + 1
                with self._tracing.step(step):
                    fault = self._one_step(step, progress, log)
                if self._tracing.ends_with(step):
                    self._end_trace(progress)
                if fault is not None and not self._go_on_after(fault, step, datasets, progress, log):
                    continue
                self._compare_copies_if_due(step)
                self._evaluate_if_due(step, datasets, progress, log)
                if self._saver.is_due(step):
                    self._save(log)
                why = self._end_step(progress)
            seconds = time.perf_counter() - began
            self._saver.settle()
            if self._saver.saved_at != self._position.iteration:
                self._save(log, is_last=True)
            self._end_trace(progress)
        finally:
            progress.close()
            log.close()
            self._saver.close()
        self._job.channel.enter(self._position.iteration, FINISH)
        return Outcome(
            position=self._position,
            resumed_from=self._resumed_from,
            stopped=self._reason(why) if self._position.iteration < steps else None,
            checkpoint=self._saver.checkpoint,
            metrics_path=log.path,
            seconds=seconds,
            stragglers=tuple(map(str, self._stragglers)),
        )

    # ---- before the first step --------------------------------------------------------------------------------

    def _prepare(self) -> Datasets:
        datasets = build_datasets(self._config, self._corpora)
        self._saver.open()
        restarted = (
            largest(self._job.launch.attempt, self._job.device) > 0
        )  # each machine counts its own restarts
        settings = self._saver.what_to_load(restarted)
        random, lineage = None, Lineage.fresh()
        if settings.load is not None:
            resumed = self._load(settings)
            self._position, random = resumed.position, resumed.random
            self._resumed_from = resumed.position.iteration
            if not settings.finetune:
                lineage = resumed.lineage.continued(resumed.position.iteration)
        self._saver.begin(lineage, restarted=restarted, loaded_from=settings.load)
        self._start_reading(datasets, random)
        return datasets

    def _load(self, settings: CheckpointConfig, *, healthy: bool = False) -> Resumed:
        """Restore the training state and what steps are judged by; neither the position nor random states."""
        assert settings.load is not None
        root = Path(settings.load)
        resumed = load_checkpoint(
            self._training, root, settings, corpus=self._corpora.identity, healthy=healthy
        )
        self._guard.window = LossWindow(resumed.losses)
        self._saver.loaded(resumed.folder, settings)
        return resumed

    def _start_reading(self, datasets: Datasets, random: dict[str, Any] | None) -> None:
        """Iterators from the present position on, then the random states that belong there."""
        consumed = self._position.consumed_samples
        self._iterators = [
            prepared_ahead(
                self._training,
                train_iterator(self._config, datasets, share_of(self._training), consumed_samples=consumed),
            )
            for _ in self._training.chunks
        ]
        if random is not None:
            restore_random_state(random)

    def _make_progress(self) -> Progress:
        first, steps = self._position.iteration, self._config.training.train_iters
        display = choose_display(
            self._config.logging.progress, rank=self._job.launch.rank, first_step=first, num_steps=steps
        )
        return Progress(
            display, first_step=first, num_steps=steps, log_interval=self._config.training.log_interval
        )

    def _attempt(self) -> Attempt:
        launch = self._job.launch
        return Attempt(
            step=self._position.iteration,
            restart=launch.attempt,
            began=psutil.Process().create_time(),
            world_size=launch.world_size,
            host=socket.gethostname(),
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
            wandb=None if logging.wandb_project is None else WandbRun(self._config),
        )

    # ---- steps ------------------------------------------------------------------------------------------------

    def _one_step(self, step: int, progress: Progress, log: MetricsLog) -> Fault | None:
        watch, waited = Stopwatch(), self._job.waits.seconds
        self._job.channel.enter(step, TRAIN)
        exposed = self._training.attention_stats.exposed_seconds
        result, fault = self._guard.step(step, self._iterators)
        seconds = self._step_s = watch.lap()
        self._busy_s = seconds - (self._job.waits.seconds - waited)
        exposed = self._training.attention_stats.exposed_seconds - exposed
        batch = self._config.training.global_batch_size
        self._position = Position(iteration=step, consumed_samples=self._position.consumed_samples + batch)
        if fault is None:
            self._bad_steps = 0
            self._saver.end_trial()
        metrics = self._measure(result, seconds, exposed)
        log.write(metrics)
        progress.step(metrics)
        return fault

    def _end_trace(self, progress: Progress) -> None:
        for line in self._tracing.finish():
            progress.note(line)

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
        failures = self._saver.record_failure()
        self._bad_steps += 1
        if failures >= FAILURES_OF_A_SUSPECT:
            self._fall_back(fault, datasets, progress, log)
            return False
        if fault.action == STOP or self._bad_steps > self._config.health.max_bad_steps:
            raise fault.error()
        if fault.action == ROLLBACK:
            self._roll_back(fault, progress, log)
        progress.note(f"step {step} is left out: its batch is skipped")
        return True

    def _roll_back(self, fault: Fault, progress: Progress, log: MetricsLog) -> None:
        """Take the state of the newest healthy checkpoint, keep the position, and save, so that a restart finds it."""
        try:
            resumed = self._load(self._saver.own_checkpoints(), healthy=True)
        except CheckpointError as error:
            raise fault.error() from error
        if resumed.random is not None:
            restore_random_state(resumed.random)
        progress.note(f"rolled back to the weights of {resumed.folder}")
        self._save(log)

    def _fall_back(self, fault: Fault, datasets: Datasets, progress: Progress, log: MetricsLog) -> None:
        """Start again from the checkpoint before one whose next step has failed twice."""
        try:
            resumed = self._load(self._saver.own_checkpoints())
        except CheckpointError as error:
            raise fault.error() from error
        self._position = resumed.position
        self._saver.saved_at, self._bad_steps = None, 0
        self._start_reading(datasets, resumed.random)
        log.write(replace(self._attempt(), began=None))
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

    def _save(self, log: MetricsLog, *, is_last: bool = False) -> None:
        if self._config.checkpoint.save is None:
            return
        self._job.channel.enter(self._position.iteration, SAVE)
        watch = Stopwatch()
        self._saver.save(self._position, self._guard.window.losses, is_last=is_last)
        log.write(SaveMetrics(step=self._position.iteration, seconds=watch.lap()))

    # ---- the end of a step, and stopping ------------------------------------------------------------------------

    def _end_step(self, progress: Progress) -> int:
        """One reduction for both: whether to stop, and whether a rank is slow. Returns the reason to stop."""
        times = [] if self._watch is None else [0] * dist.get_world_size()
        if times:
            times[self._job.launch.rank] = int(1e9 * self._busy_s)
        numbers = [self._own_reason(), int(self._saver.is_writing), *times]
        why, writing, *busy = all_largest(numbers, self._job.device)
        if not writing:
            self._saver.settle()
        if self._watch is not None:
            for straggler in self._watch.add([1e-9 * ns for ns in busy], self._step_s):
                progress.note(f"WARNING: {straggler}")
                self._stragglers.append(straggler)
        return why

    def _agree_to_stop(self) -> int:
        """The most important reason of any rank to stop after this step: a signal may reach only one rank."""
        return largest(self._own_reason(), self._job.device)

    def _own_reason(self) -> int:
        return ASKED_TO_STOP if self._stop else OUT_OF_TIME if time.monotonic() > self._deadline else RUNNING

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
    training = build_training(config, vocab_size=corpora.vocab_size)
    job.channel.follow(training.attention_stats.place)
    return Loop(job, training, corpora, stop)


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
