"""Scaled-down models on gloo ranks: a few steps on the same data, however the sequence is cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tests.harness.ranks import run_ranks
from tests.models.scaled import VOCAB_SIZE, read, scaled

Result = tuple[list[float], list[float]]
"""Losses and gradient norms of the steps."""


def on_ranks(world_size: int, path: Path, values: dict[str, Any]) -> Result:
    """Train the recipe on this many ranks; ``values`` replace keys of its scaled-down form."""
    found: Result = run_ranks(world_size, train, str(path), values, timeout_s=240)[0]
    return found


def train(path: str, values: dict[str, Any]) -> Result:
    """Train on this rank; runs in a worker process."""
    from megatron.core import parallel_state

    from megatron_lightseq.megatron.cpu import platform as cpu_platform
    from megatron_lightseq.training.setup import build_training
    from megatron_lightseq.training.step import train_step

    cpu_platform.activate()
    config = scaled(read(Path(path)), **values)
    try:
        training = build_training(config, vocab_size=VOCAB_SIZE)
        steps = [
            train_step(training, [batches(step, training.num_microbatches, config.training.seq_length)])
            for step in range(config.training.train_iters)
        ]
    finally:
        parallel_state.destroy_model_parallel()
    return [step.loss for step in steps], [step.grad_norm for step in steps]


def batches(step: int, count: int, length: int) -> Iterator[dict[str, torch.Tensor]]:
    """Whole sequences of random tokens."""
    for index in range(count):
        generator = torch.Generator().manual_seed(100 * step + index)
        ids = torch.randint(0, VOCAB_SIZE, (1, length + 1), generator=generator)
        yield {
            "tokens": ids[:, :-1].contiguous(),
            "labels": ids[:, 1:].contiguous(),
            "position_ids": torch.arange(length)[None],
            "loss_mask": torch.ones(1, length),
        }
