"""Short training runs that save and resume, for run_ranks: each function runs on every rank."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.megatron.runs import TINY, VOCAB_SIZE, batches

STEPS = 5
SAVED_AT = 3


@dataclass(frozen=True)
class Outcome:
    """The results of a rank; losses and norms are compared bit for bit."""

    losses: list[float]
    grad_norms: list[float]
    learning_rates: list[float]
    next_random: float
    started_at: int = 0
    consumed_samples: int = 0


@contextmanager
def built(overrides: dict[str, Any]) -> Iterator[Any]:
    """A Training for TINY with ``overrides``, which is cleaned up afterwards."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    from megatron.core import parallel_state

    from megatron_lightseq.config import PretrainConfig, with_values
    from megatron_lightseq.megatron.cpu import platform as cpu_platform
    from megatron_lightseq.training.setup import build_training

    cpu_platform.activate()
    config = with_values(PretrainConfig(), **{**TINY, "train_iters": STEPS, **overrides})
    try:
        yield build_training(config, vocab_size=VOCAB_SIZE)
    finally:
        parallel_state.destroy_model_parallel()


def train_and_save(overrides: dict[str, Any], root: str, saves: tuple[int, ...] = (SAVED_AT,)) -> Outcome:
    """Train all steps without interruption, saving on the way."""
    from megatron_lightseq.training.checkpoint.saving import save_checkpoint
    from megatron_lightseq.training.checkpoint.state import Position

    with built(overrides) as training:
        results: list[Any] = []
        for step in range(STEPS + 1):
            if step in saves:
                save_checkpoint(training, Path(root), Position(iteration=step, consumed_samples=4 * step))
            if step < STEPS:
                results.append(_step(training, step))
        return _outcome(results)


def resume(overrides: dict[str, Any], root: str) -> Outcome:
    """Load a checkpoint and train the remaining steps."""
    from megatron_lightseq.training.checkpoint.loading import load_checkpoint
    from megatron_lightseq.training.checkpoint.random_state import restore_random_state

    with built(overrides) as training:
        torch.rand(7)  # stands for the random numbers that creating iterators draws
        resumed = load_checkpoint(training, Path(root))
        if resumed.random is not None:
            restore_random_state(resumed.random)
        position = resumed.position
        results = [_step(training, step) for step in range(position.iteration, STEPS)]
        return _outcome(results, position.iteration, position.consumed_samples)


def refusal(overrides: dict[str, Any], root: str) -> str:
    """The message with which a checkpoint is refused."""
    from megatron_lightseq.errors import CheckpointError

    try:
        resume(overrides, root)
    except CheckpointError as error:
        return str(error)
    raise AssertionError("the checkpoint was loaded")


def _step(training: Any, step: int) -> Any:
    from megatron_lightseq.training.step import train_step

    return train_step(training, [batches(training, step) for _ in training.chunks])


def _outcome(results: list[Any], started_at: int = 0, consumed_samples: int = 0) -> Outcome:
    return Outcome(
        losses=[result.loss for result in results],
        grad_norms=[result.grad_norm for result in results],
        learning_rates=[result.learning_rate for result in results],
        next_random=torch.rand(1, dtype=torch.float64).item(),
        started_at=started_at,
        consumed_samples=consumed_samples,
    )
