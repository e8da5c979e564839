"""Runs with adapters on an imported model, for run_ranks: each function runs on every rank."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from tests.convert.loaded import _forward
from tests.convert.models import LENGTH
from tests.megatron.runs import batches

LORA = ["--lora-dim", "4", "--lora-alpha", "8", "--lr", "1e-2", "--global-batch-size", "2"]


def train_adapters(
    recipe: str, flags: list[str], tokens: torch.Tensor, root: str, steps: int, load: str | None = None
) -> tuple[torch.Tensor | None, list[float]]:
    """Load, train, save; the logits of this rank afterwards and the losses.

    Args:
        recipe: the YAML file that the import has written.
        flags: command line after it.
        tokens: (B, S), of which logits are computed.
        root: where to save.
        steps: to which to train.
        load: folder to resume from; default: the imported weights.
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    from megatron.core import parallel_state

    from megatron_lightseq.config import load_config
    from megatron_lightseq.megatron.cpu import platform as cpu_platform
    from megatron_lightseq.training.checkpoint.loading import load_checkpoint
    from megatron_lightseq.training.checkpoint.saving import save_checkpoint
    from megatron_lightseq.training.checkpoint.state import Position
    from megatron_lightseq.training.setup import build_training
    from megatron_lightseq.training.step import train_step

    cpu_platform.activate()
    resumed = ["--load", load, "--finetune", "false"] if load else []
    command = [recipe, "--seq-length", str(LENGTH), "--data-path", "unread", *LORA, *flags, *resumed]
    config: Any = load_config(command)
    try:
        training = build_training(config, vocab_size=config.data.vocab_size)
        first = load_checkpoint(training, Path(config.checkpoint.load)).position.iteration
        losses = [train_step(training, [batches(training, step)]).loss for step in range(first, steps)]
        save_checkpoint(training, Path(root), Position(iteration=steps, consumed_samples=2 * steps))
        return _forward(training, tokens), losses
    finally:
        parallel_state.destroy_model_parallel()
