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
from megatron_lightseq.errors import LightSeqError, explain
from megatron_lightseq.training.checkpoint.companions import take_over
from megatron_lightseq.training.checkpoint.directory import CheckpointDirectory
from megatron_lightseq.training.checkpoint.folder_lock import FolderLock
from megatron_lightseq.training.checkpoint.lineage import Lineage
from megatron_lightseq.training.checkpoint.random_state import restore_random_state
from megatron_lightseq.training.checkpoint.save_load import Position, load_checkpoint, save_checkpoint
from megatron_lightseq.training.data.datasets import Corpora, Datasets, build_datasets
from megatron_lightseq.training.data.loaders import train_iterator, valid_iterator
from megatron_lightseq.training.data.rows import DataShare
from megatron_lightseq.training.job.failure import EVALUATE, FINISH, SAVE, SET_UP, TRAIN
from megatron_lightseq.training.job.join import Job
from megatron_lightseq.training.job.signals import StopRequest
from megatron_lightseq.training.reporting.memory import peak_resident_bytes
from megatron_lightseq.training.reporting.metrics import MetricsLog, TrainMetrics, ValidationMetrics
from megatron_lightseq.training.reporting.progress import Progress, Stopwatch, choose_display, duration
from megatron_lightseq.training.reporting.report import Outcome, header
from megatron_lightseq.training.setup import Training, build_training
from megatron_lightseq.training.step import StepResult, evaluate, train_step
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

    def run(self) -> Outcome:
        """Load, train, evaluate, save."""
        iterators, datasets = self._prepare()
        steps = self._config.training.train_iters
        progress = self._make_progress()
        log = self._make_log()
        began, why = time.perf_counter(), RUNNING
        try:
            progress.table(header(self._training, self._corpora, self._job))
            if self._resumed_from:
                progress.note(f"resumed from {self._checkpoint} at step {self._resumed_from}")
            for step in range(self._position.iteration + 1, steps + 1):
                self._one_step(step, iterators, progress, log)
                self._evaluate_if_due(step, datasets, progress, log)
                self._save_if_due(step, progress)
                why = self._agree_to_stop()
                if why != RUNNING:
                    break
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

    def _prepare(self) -> tuple[list[Iterator[Any]], Datasets]:
        config = self._config
        random = None
        datasets = build_datasets(config, self._corpora)
        folder = self._own_folder()
        if folder is not None:
            self._lock = folder.lock()
            folder.clean()
        restarted = self._largest(self._job.launch.attempt) > 0  # each machine counts its own restarts
        settings = self._load_settings(restarted)
        if settings.load is not None:
            resumed = load_checkpoint(self._training, Path(settings.load), settings)
            self._position, random = resumed.position, resumed.random
            self._resumed_from, self._checkpoint = resumed.position.iteration, resumed.folder
            if not settings.finetune:
                self._lineage = resumed.lineage.continued(resumed.position.iteration)
        if folder is not None:
            self._lineage = (folder.started() if restarted else None) or self._lineage
            folder.start(self._lineage)
            if settings.load is not None:
                take_over(Path(settings.load), folder.root)
        iterators = [
            train_iterator(config, datasets, self._share(), consumed_samples=self._position.consumed_samples)
            for _ in self._training.chunks
        ]
        if random is not None:
            restore_random_state(random)
        return iterators, datasets

    def _load_settings(self, restarted: bool) -> CheckpointConfig:
        """What to load; after a restart by torchrun, everything that this run has saved so far."""
        settings, folder = self._config.checkpoint, self._own_folder()
        if settings.resume == "auto":
            saved = folder is not None and bool(folder.candidates())
        else:
            saved = restarted and folder is not None and bool(folder.of_this_run())
        if not self._largest(int(saved)):
            return settings
        return CheckpointConfig(save=settings.save, load=settings.save, strict_load=settings.strict_load)

    def _own_folder(self) -> CheckpointDirectory | None:
        """The folder to save in, on the rank that looks after it; else None."""
        save = self._config.checkpoint.save
        return None if save is None or self._job.launch.rank > 0 else CheckpointDirectory(root=Path(save))

    def _largest(self, number: int) -> int:
        """The largest of the ranks' numbers. Collective."""
        largest = torch.tensor(number, device=self._job.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest.item())

    def _share(self) -> DataShare:
        groups = self._training.groups
        return DataShare(
            rank=rank_in(groups.dp),
            size=self._training.sizes.data,
            layout=self._training.layout,
            cp_rank=rank_in(groups.cp),
        )

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

    def _one_step(
        self, step: int, iterators: list[Iterator[Any]], progress: Progress, log: MetricsLog
    ) -> None:
        self._job.channel.enter(step, TRAIN)
        watch = Stopwatch()
        exposed = self._training.attention_stats.exposed_seconds
        result = train_step(self._training, iterators)
        seconds = watch.lap()
        exposed = self._training.attention_stats.exposed_seconds - exposed
        batch = self._config.training.global_batch_size
        self._position = Position(iteration=step, consumed_samples=self._position.consumed_samples + batch)
        _check_finite(step, result)
        metrics = self._measure(result, seconds, exposed)
        log.write(metrics)
        progress.step(metrics)

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
        iterators = [valid_iterator(self._config, datasets, self._share()) for _ in self._training.chunks]
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
        self._checkpoint = save_checkpoint(self._training, root, self._position, self._lineage)
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


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process in bytes: resident memory on a CPU, memory allocated by torch on a GPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return peak_resident_bytes()


def _deadline(minutes: float | None) -> float:
    return math.inf if minutes is None else time.monotonic() + 60 * minutes


def _check_finite(step: int, result: StepResult) -> None:
    if not math.isfinite(result.loss) or not (result.skipped or math.isfinite(result.grad_norm)):
        raise LightSeqError(
            explain(
                got=f"loss {result.loss} at step {step} (grad norm {result.grad_norm})",
                rule="loss and gradients must be finite; the run stops before spoiled weights are saved",
                remedy="Lower lr or raise lr_warmup_iters, and --load the last checkpoint",
            )
        )
