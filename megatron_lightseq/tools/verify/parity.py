"""One training step of a cell, and its comparison with a single process."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_lightseq.config import PretrainConfig, with_values
from megatron_lightseq.megatron.batch import shard_batch
from megatron_lightseq.megatron.packing import Packing
from megatron_lightseq.tools.verify.cells import SMALL, Cell, Tolerance, Values
from megatron_lightseq.tools.verify.gradients import Gradients, Piece, assemble, pieces_of
from megatron_lightseq.training.setup import Training, build_training
from megatron_lightseq.training.step import evaluate, train_step
from megatron_lightseq.transport.group import rank_in

VOCAB_SIZE = 61


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedStep:
    """Results of a training step: losses, gradient norm, and the gradients of all parameters on all replicas."""

    loss: float
    grad_norm: float
    gradients: Gradients
    mtp_loss: float | None = None
    """Of multi-token prediction; None without it."""
    load_balancing_loss: float | None = None
    """Of experts; None without it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Relative differences between a cell and a single process."""

    loss: float
    """The largest difference of the losses: next token, multi-token prediction and load balancing."""
    grad_norm: float
    gradient: float
    """Of the parameter with the largest difference."""
    parameter: str
    tolerance: Tolerance

    @property
    def passed(self) -> bool:
        """Whether all differences are within their tolerances; NaN is not."""
        return (
            self.loss <= self.tolerance.loss
            and self.grad_norm <= self.tolerance.grad_norm
            and self.gradient <= self.tolerance.gradient
        )


def configure(values: Values, extra: Values) -> PretrainConfig:
    """The small model run with ``values``; ``extra`` is what the user adds to every cell."""
    return with_values(PretrainConfig(), **{**SMALL, **extra, **values})


def reference_values(cell: Cell) -> dict[str, Any]:
    """A single process with Megatron's own attention, without any of our code in it."""
    return {**cell.model, "cp_method": "megatron", "cp_layout": "auto", "cp_kernel": "auto"}


def exact_values(cell: Cell) -> dict[str, Any]:
    """The same process in fp32."""
    return {**reference_values(cell), "bf16": False}


def run_step(
    config: PretrainConfig, *, dense_mask: bool = False, evaluated_first: bool = False
) -> TrainedStep | None:
    """Build the model, train one step and collect the gradients on rank 0; None on other ranks. Collective.

    Args:
        config: of the model and of how it is run.
        dense_mask, evaluated_first: as in :class:`Cell`.
    """
    from megatron.core import parallel_state

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron warns about fields that have their default values
        try:
            training = build_training(config, vocab_size=VOCAB_SIZE)
            if dense_mask:
                _give_dense_masks(training)
            if evaluated_first:
                with torch.inference_mode():
                    evaluate(training, [batches(training) for _ in training.chunks], 1)
            result = train_step(training, [batches(training) for _ in training.chunks])
            pieces = pieces_of(training)
        finally:
            parallel_state.destroy_model_parallel()
    gathered: list[list[Piece]] | None = [[]] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(pieces, gathered, dst=0)
    if gathered is None:
        return None
    return TrainedStep(
        loss=result.loss,
        mtp_loss=result.mtp_loss,
        load_balancing_loss=result.load_balancing_loss,
        grad_norm=result.grad_norm,
        gradients=assemble([piece for rank_pieces in gathered for piece in rank_pieces]),
    )


def _give_dense_masks(training: Training) -> None:
    """Give every model the mask that a data loader would: True hides a key; documents end at a third of a sequence."""
    settings = training.config.training
    border = settings.seq_length // 3
    hidden = torch.ones(settings.seq_length, settings.seq_length, dtype=torch.bool).triu(1)
    hidden[border:, :border] = True
    whole = {"attention_mask": hidden[None, None].to(training.device)}
    mask = shard_batch(whole, training.layout, rank_in(training.groups.cp))["attention_mask"]

    def give(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tokens, positions, _ = args
        return (tokens, positions, mask), kwargs

    for model in training.models:
        model.register_forward_pre_hook(give, with_kwargs=True)


def batches(training: Training) -> Iterator[dict[str, Any]]:
    """Micro-batches of this data-parallel rank: the same for any number of ranks, with uneven loss masks."""
    settings, data = training.config.training, training.config.data
    length = settings.seq_length
    generator = torch.Generator().manual_seed(settings.seed)
    text = torch.randint(0, VOCAB_SIZE, (settings.global_batch_size, length + 1), generator=generator)
    kept = torch.linspace(0.1, 1.0, length)  # early tokens are masked more often than late ones
    mask = (torch.rand(settings.global_batch_size, length, generator=generator) < kept).float()
    if data.packed and not data.sft:
        text[torch.rand(text.shape, generator=generator) < 0.1] = END_OF_DOCUMENT
    shape = (training.num_microbatches, training.sizes.data, settings.micro_batch_size, -1)
    data_rank = 0 if training.groups.dp is None else training.groups.dp.rank()
    mine = (x.view(shape)[:, data_rank] for x in (text, mask))
    for number, (tokens, loss_mask) in enumerate(zip(*mine, strict=True)):
        first = (number * training.sizes.data + data_rank) * settings.micro_batch_size
        batch: dict[str, Any] = {
            "tokens": tokens[:, :-1].contiguous(),
            "labels": tokens[:, 1:].contiguous(),
            "loss_mask": loss_mask.contiguous(),
            "position_ids": torch.arange(length).expand(len(tokens), -1).contiguous(),
        }
        yield _packed(batch, first, training.config) if data.packed else batch


END_OF_DOCUMENT = 7
_DOCUMENTS = ((5, 31, 1, 22), (11,), (40, 17, 39), (2, 3, 50))
"""Lengths of packed documents in rows of 96 tokens; the second leaves all ranks but the first nothing but padding."""


def _packed(batch: dict[str, Any], first: int, config: PretrainConfig) -> dict[str, Any]:
    """The batch with its documents: those of its tokens, or with sft some that are followed by padding.

    Args:
        batch: tensors of whole sequences.
        first: number of its first sequence in the global batch.
        config: of the run.
    """
    length = config.training.seq_length
    if config.data.sft:
        rows = [
            Packing.of_documents(_DOCUMENTS[(first + row) % len(_DOCUMENTS)], length)
            for row in range(len(batch["tokens"]))
        ]
        inside = torch.stack([~row.lasts() for row in rows])
        batch["loss_mask"] = batch["loss_mask"] * inside
    else:
        rows = [Packing.of_tokens(tokens, END_OF_DOCUMENT) for tokens in batch["tokens"]]
    if config.data.restarts_positions:
        batch["position_ids"] = torch.stack([row.positions() for row in rows])
    return {**batch, "packing": Packing.joined(rows)}


def compare(got: TrainedStep, reference: TrainedStep, tolerance: Tolerance) -> Verdict:
    """The differences of a cell from the reference, over all parameters and replicas.

    A parameter that only one of the two has counts as an infinite difference.
    """
    whole = {name: gradient for name, (gradient,) in reference.gradients.items()}
    overall = max(gradient.norm().item() for gradient in whole.values())
    worst, parameter = 0.0, ""
    for name in whole.keys() ^ got.gradients.keys():
        worst, parameter = math.inf, name
    for name in sorted(whole.keys() & got.gradients.keys()):
        # Gradients that vanish by symmetry (key biases) are rounding noise: compare them with the largest gradient.
        size = max(whole[name].norm().item(), 1e-3 * overall)
        for gradient in got.gradients[name]:
            distance = (gradient - whole[name]).norm().item() / size
            if math.isnan(distance):
                distance = math.inf
            if distance > worst:
                worst, parameter = distance, name
    losses = ("loss", "mtp_loss", "load_balancing_loss")
    return Verdict(
        loss=max(_distance(getattr(got, name), getattr(reference, name)) for name in losses),
        grad_norm=_distance(got.grad_norm, reference.grad_norm),
        gradient=worst,
        parameter=parameter,
        tolerance=tolerance,
    )


def budget(reference: TrainedStep, exact: TrainedStep, tolerance: Tolerance) -> Tolerance:
    """The tolerance of a cell in bf16: twice the error of Megatron's own process in bf16, plus ``tolerance``.

    Both are compared with the process in fp32, so that a cell must be accurate, rather than reproduce Megatron's
    rounding errors.

    Args:
        reference: A single process in bf16.
        exact: The same process in fp32.
        tolerance: Allowed in addition.
    """
    lost = compare(reference, exact, tolerance)
    return Tolerance(
        loss=2 * lost.loss + tolerance.loss,
        grad_norm=2 * lost.grad_norm + tolerance.grad_norm,
        gradient=2 * lost.gradient + tolerance.gradient,
    )


def _distance(got: float | None, expected: float | None) -> float:
    """Relative difference; infinite if only one of the two is given, or one of them is NaN."""
    if got is None or expected is None:
        return 0.0 if got is expected else math.inf
    distance = abs(got - expected) / abs(expected)
    return math.inf if math.isnan(distance) else distance
