"""The memory of one rank, by running its training step on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules

from megatron_lightseq.config import PretrainConfig
from megatron_lightseq.config.flat import with_values
from megatron_lightseq.config.resolved import ResolvedConfig, resolve
from megatron_lightseq.config.rules import Machine
from megatron_lightseq.config.sizes import ParallelSizes
from megatron_lightseq.config.validate import TRAINING_RULES
from megatron_lightseq.megatron.packing import Packing
from megatron_lightseq.tools.planner.fake_world import fake_world
from megatron_lightseq.tools.planner.ledger import Ledger, Moment
from megatron_lightseq.tools.planner.purposes import GRADIENTS, WEIGHTS, purpose_of
from megatron_lightseq.training.setup import Training, build_training, initialize_parallel
from megatron_lightseq.training.step import Batch, train_step

FORWARD, BACKWARD, UPDATE = "forward", "backward", "update"
"""Phases of a step: their peaks are kept apart, because layers add different amounts to each."""


@dataclass(frozen=True, slots=True)
class Traced:
    """What a traced step held."""

    peaks: dict[str, Moment]
    """By phase."""

    @property
    def peak(self) -> Moment:
        """The largest of all phases."""
        return max(self.peaks.values(), key=lambda moment: moment.total)


def trace(config: PretrainConfig, rank: int, world_size: int, *, vocab_size: int, fused: bool) -> Traced:
    """Run one rank's training step on fake tensors; returns the peaks of its second step.

    The first step is there because optimizer state and receive buffers exist from then on.

    Args:
        config: of the run; its rules must hold.
        rank: of ``world_size``.
        world_size: number of ranks.
        vocab_size: of the tokenizer.
        fused: with Megatron's fusions, which it uses on GPUs.
    """
    resolved = resolve(config, Machine(world_size=world_size), rule_sets=TRAINING_RULES)
    topk = config.experts.moe_router_topk
    with fake_world(rank, world_size, fused=fused, topk=topk):
        groups = initialize_parallel(resolved)
        ledger = Ledger(purpose_of)
        with ledger, ledger.resizing():
            training = build_training(resolved, vocab_size=vocab_size, groups=groups)
            _adopt(ledger, training)
            with _phases(ledger, training):
                _warm_up(training)
                ledger.peaks.clear()
                train_step(training, [batches(training) for _ in training.chunks])
        return Traced({name: ledger.peaks[name] for name in (FORWARD, BACKWARD, UPDATE)})


def _warm_up(training: Training) -> None:
    """Bring about what exists from the second step on: optimizer state, and receive buffers.

    Without a pipeline, the first of several micro-batches makes the buffers: an update without a step is enough.
    """
    if training.num_microbatches > 1 and training.sizes.pipeline == 1:
        training.optimizer.step()
        return
    whole, sizes = training.resolved, training.sizes
    few = sizes.pipeline if len(training.chunks) > 1 else 1
    micro = whole.config.training.micro_batch_size
    fewer = with_values(whole.config, global_batch_size=few * micro * sizes.data)
    training.resolved = ResolvedConfig(config=fewer, machine=whole.machine, attention=whole.attention)
    train_step(training, [batches(training) for _ in training.chunks])
    training.resolved = whole


def _adopt(ledger: Ledger, training: Training) -> None:
    """Name weights and gradients, wherever they were created: Megatron keeps them in flat buffers."""
    for chunk in training.chunks:
        for parameter in chunk.parameters():
            ledger.adopt(parameter, WEIGHTS)
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            ledger.adopt(buffer.grad_data, GRADIENTS)
            if buffer.param_data is not None:
                ledger.adopt(buffer.param_data, WEIGHTS)


@contextmanager
def _phases(ledger: Ledger, training: Training) -> Iterator[None]:
    """Tell the ledger when a step goes backward and when it updates the weights; otherwise it goes forward."""
    optimizer, backward_step = training.optimizer, schedules.backward_step
    updates = ("prepare_grads", "get_grad_norm", "step_with_ready_grads")

    def within(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with ledger.phase(phase):
                return function(*args, **kwargs)

        return run

    schedules.backward_step = within(BACKWARD, backward_step)
    for name in updates:
        setattr(optimizer, name, within(UPDATE, getattr(optimizer, name)))
    try:
        with ledger.phase(FORWARD):
            yield
    finally:
        schedules.backward_step = backward_step
        for name in updates:
            delattr(optimizer, name)


def batches(training: Training) -> Iterator[Batch]:
    """Micro-batches of the configured shape, endlessly; packed rows are one document each."""
    config = training.config
    shape = (config.training.micro_batch_size, config.training.seq_length)
    while True:
        batch: dict[str, Any] = {
            name: torch.zeros(shape, dtype=torch.long) for name in ("tokens", "labels", "position_ids")
        }
        batch["loss_mask"] = torch.ones(shape)
        if config.data.packed:
            batch["packing"] = Packing.joined([Packing.of_documents([shape[1]], shape[1])] * shape[0])
        yield batch


def stage_rank(config: PretrainConfig, world_size: int, stage: int, context_rank: int = 0) -> int:
    """The rank of a pipeline stage with this context parallel rank, and the first of all other kinds.

    Megatron numbers ranks by tensor, context, data and pipeline parallel rank, the first of which runs fastest.
    """
    sizes = ParallelSizes.of(config, world_size)
    return stage * (world_size // sizes.pipeline) + context_rank * sizes.tensor
