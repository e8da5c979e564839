"""Training runs with adapters or frozen parts, for run_ranks: each function runs on every rank."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from tests.megatron.runs import TINY, VOCAB_SIZE, batches

STEPS = 4


@dataclass(frozen=True)
class Tuned:
    """The results of a rank."""

    losses: list[float]
    grad_norms: list[float]
    changed: list[str]
    """Names in the whole model of the parameters that the run has changed."""
    trained: int
    """Elements in gradient buffers."""
    in_optimizer: int
    """Elements of all parameters of the optimizer."""


def tune(overrides: dict[str, Any]) -> Tuned:
    """Train a tiny model with what ``overrides`` freeze."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    from megatron.core import parallel_state

    from megatron_lightseq.config import PretrainConfig, with_values
    from megatron_lightseq.megatron.cpu import platform as cpu_platform
    from megatron_lightseq.training.setup import build_training
    from megatron_lightseq.training.step import train_step
    from megatron_lightseq.training.trained_parts import global_names

    cpu_platform.activate()
    config = with_values(PretrainConfig(), **{**TINY, "swiglu": True, "train_iters": STEPS, **overrides})
    try:
        training = build_training(config, vocab_size=VOCAB_SIZE)
        before = [
            (name, p, p.detach().clone()) for model in training.models for name, p in global_names(model)
        ]
        results = [
            train_step(training, [batches(training, step) for _ in training.chunks]) for step in range(STEPS)
        ]
        groups = training.optimizer.param_groups
        return Tuned(
            losses=[result.loss for result in results],
            grad_norms=[result.grad_norm for result in results],
            changed=[name for name, p, was in before if not torch.equal(p, was)],
            trained=sum(buffer.numel_unpadded for chunk in training.chunks for buffer in chunk.buffers),
            in_optimizer=sum(p.numel() for group in groups for p in group["params"]),
        )
    finally:
        parallel_state.destroy_model_parallel()
