"""One training step of a cell, and its comparison with one process."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_lightseq.config import PretrainConfig, with_values
from megatron_lightseq.tools.verify.cells import SMALL, Cell, Tolerance, Values
from megatron_lightseq.tools.verify.gradients import Gradients, Piece, assemble, pieces_of
from megatron_lightseq.training.setup import Training, build_training
from megatron_lightseq.training.step import train_step

VOCAB_SIZE = 61


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a step left: the losses, the norm of all gradients, and each parameter's on every replica."""

    loss: float
    grad_norm: float
    gradients: Gradients
    mtp_loss: float | None = None
    """Of multi-token prediction, where there is any."""
    load_balancing_loss: float | None = None
    """Of experts, where they have one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How far a cell is from one process, relative."""

    loss: float
    """Of the next token, of multi-token prediction or of load balancing, whichever is furthest."""
    grad_norm: float
    gradient: float
    """Of the parameter that is furthest."""
    parameter: str
    tolerance: Tolerance

    @property
    def passed(self) -> bool:
        """Whether all are within their tolerance; a NaN is not."""
        return (
            self.loss <= self.tolerance.loss
            and self.grad_norm <= self.tolerance.grad_norm
            and self.gradient <= self.tolerance.gradient
        )


def configure(values: Values, extra: Values) -> PretrainConfig:
    """The small model run with ``values``; ``extra`` is what the user adds to every cell."""
    return with_values(PretrainConfig(), **{**SMALL, **extra, **values})


def reference_values(cell: Cell) -> dict[str, Any]:
    """One process with Megatron's own attention, which knows nothing of ours."""
    return {**cell.model, "cp_method": "megatron", "cp_layout": "auto", "cp_kernel": "auto"}


def exact_values(cell: Cell) -> dict[str, Any]:
    """The same process in fp32."""
    return {**reference_values(cell), "bf16": False}


def run_step(config: PretrainConfig) -> Outcome | None:
    """Build the model, train one step, collect the gradients on rank 0; None on other ranks. Collective."""
    from megatron.core import parallel_state

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron's about fields that are left at their defaults
        try:
            training = build_training(config, vocab_size=VOCAB_SIZE)
            result = train_step(training, [batches(training) for _ in training.chunks])
            pieces = pieces_of(training)
        finally:
            parallel_state.destroy_model_parallel()
    gathered: list[list[Piece]] | None = [[]] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(pieces, gathered, dst=0)
    if gathered is None:
        return None
    return Outcome(
        loss=result.loss,
        mtp_loss=result.mtp_loss,
        load_balancing_loss=result.load_balancing_loss,
        grad_norm=result.grad_norm,
        gradients=assemble([piece for rank_pieces in gathered for piece in rank_pieces]),
    )


def batches(training: Training) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches of this data-parallel rank: the same on any number of ranks; loss masks uneven along them."""
    settings = training.config.training
    length = settings.seq_length
    generator = torch.Generator().manual_seed(settings.seed)
    text = torch.randint(0, VOCAB_SIZE, (settings.global_batch_size, length + 1), generator=generator)
    kept = torch.linspace(0.1, 1.0, length)  # early tokens are masked far more often than late ones
    mask = (torch.rand(settings.global_batch_size, length, generator=generator) < kept).float()
    shape = (training.num_microbatches, training.sizes.data, settings.micro_batch_size, -1)
    data_rank = 0 if training.groups.dp is None else training.groups.dp.rank()
    mine = (x.view(shape)[:, data_rank] for x in (text, mask))
    for tokens, loss_mask in zip(*mine, strict=True):
        yield {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "loss_mask": loss_mask.contiguous(),
            "position_ids": torch.arange(length).expand(len(tokens), -1).contiguous(),
        }


def compare(outcome: Outcome, reference: Outcome, tolerance: Tolerance) -> Verdict:
    """The distance of a cell, over all parameters of all replicas.

    A parameter that only one of the two has counts as infinitely far.
    """
    whole = {name: gradient for name, (gradient,) in reference.gradients.items()}
    overall = max(gradient.norm().item() for gradient in whole.values())
    worst, parameter = 0.0, ""
    for name in whole.keys() ^ outcome.gradients.keys():
        worst, parameter = math.inf, name
    for name in sorted(whole.keys() & outcome.gradients.keys()):
        # Gradients that vanish by symmetry (key biases) are noise: they count against the largest one.
        size = max(whole[name].norm().item(), 1e-3 * overall)
        for gradient in outcome.gradients[name]:
            distance = (gradient - whole[name]).norm().item() / size
            if math.isnan(distance):
                distance = math.inf
            if distance > worst:
                worst, parameter = distance, name
    losses = ("loss", "mtp_loss", "load_balancing_loss")
    return Verdict(
        loss=max(_distance(getattr(outcome, name), getattr(reference, name)) for name in losses),
        grad_norm=_distance(outcome.grad_norm, reference.grad_norm),
        gradient=worst,
        parameter=parameter,
        tolerance=tolerance,
    )


def budget(reference: Outcome, exact: Outcome, tolerance: Tolerance) -> Tolerance:
    """What a cell in 16 bits may lose: on top of ``tolerance``, twice what Megatron's own process in 16 bits loses.

    Both are held against the process in fp32, so that a cell is asked for the right result and not for Megatron's
    rounding errors.

    Args:
        reference: one process in 16 bits.
        exact: the same in fp32.
        tolerance: what is granted besides.
    """
    lost = compare(reference, exact, tolerance)
    return Tolerance(
        loss=2 * lost.loss + tolerance.loss,
        grad_norm=2 * lost.grad_norm + tolerance.grad_norm,
        gradient=2 * lost.gradient + tolerance.gradient,
    )


def _distance(got: float | None, expected: float | None) -> float:
    """Relative; infinite where only one of the two is there, or either is not a number."""
    if got is None or expected is None:
        return 0.0 if got is expected else math.inf
    distance = abs(got - expected) / abs(expected)
    return math.inf if math.isnan(distance) else distance
