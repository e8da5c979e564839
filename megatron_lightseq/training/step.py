"""One optimizer step, and one evaluation, through Megatron's pipeline schedules.

The loss is exact for any loss mask and any number of ranks. Every rank sums the losses of its unmasked tokens; the
divisor of the sums is the same on all ranks:

* ``calculate_per_token_loss`` (default): the number of unmasked tokens in the global batch. Megatron sums gradients
  over data and context parallel ranks and divides once (distributed/finalize_model_grads.py).
* Otherwise Megatron's average of averages: each micro-batch is divided by its own unmasked tokens on all context
  parallel ranks, then averaged over micro-batches and data parallel ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_lightseq.megatron.batch import adopt_shard, shard_batch
from megatron_lightseq.training.auxiliary_losses import (
    clear_trackers,
    from_last_stage,
    load_balancing_loss,
    mtp_loss,
)
from megatron_lightseq.training.packed_batches import Documents, documents_of
from megatron_lightseq.training.setup import Training, gpt_model
from megatron_lightseq.transport.group import rank_in, size_of

Batch = Mapping[str, Any]
"""``tokens``, ``labels``, ``position_ids`` (int64) and ``loss_mask`` (fp32), each (micro_batch_size, seq_length); and
of packed data, ``packing``, the :class:`~megatron_lightseq.megatron.packing.Packing` of its rows, joined. With
``shard``, a :class:`~megatron_lightseq.megatron.batch.Shard`, tensors hold this rank's tokens only, and those of packed
data are (1, local tokens)."""
DataIterators = Iterator[Batch] | Sequence[Iterator[Batch]]
"""One iterator, or one per model chunk of an interleaved pipeline, whose chunks read the same batches independently.
All ranks of a data parallel replica read the same sequences: whole, to be cut here, or each its own tokens."""

Given = Mapping[str, Any]
"""This rank's tokens of a micro-batch."""
Report = Callable[[Given, torch.Tensor], torch.Tensor]
"""From a micro-batch on this rank (``loss_mask`` and ``position_ids``, (B, S)) and its losses (B, S) to a tensor."""

_MODEL_INPUTS = ("tokens", "position_ids")
_LOSS_INPUTS = ("labels", "loss_mask", "position_ids")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """The result of one step; the same on every rank."""

    loss: float
    """Mean loss in nats per token, over the global batch."""
    grad_norm: float
    """Global gradient norm before clipping."""
    num_tokens: int
    """Unmasked tokens of the global batch."""
    learning_rate: float
    """Learning rate of this step."""
    skipped: bool
    """Whether the weights were left as they were, because loss or gradients were bad."""
    mtp_loss: float | None = None
    """With multi-token prediction: its mean loss before its weight; every micro-batch counts the same."""
    load_balancing_loss: float | None = None
    """With a load balancing loss: its mean over layers and micro-batches, before its coefficient; 1 is balance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalResult:
    """The result of an evaluation; the same on every rank."""

    loss: float
    """Mean loss in nats per token."""
    num_tokens: int
    """Number of unmasked tokens evaluated."""
    complete: bool
    """Whether all batches were evaluated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What one global batch has given before the weights are updated; the same on every rank."""

    loss: float
    """Mean loss in nats per token, over the global batch."""
    grad_norm: float
    """Global gradient norm before clipping."""
    num_tokens: int
    """Unmasked tokens of the global batch."""
    mtp_loss: float | None = None
    load_balancing_loss: float | None = None

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradients are numbers that an update can use."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def train_step(training: Training, data_iterators: DataIterators) -> StepResult:
    """Forward, backward and update on one global batch; without the update if they are not finite. Collective.

    Args:
        training: from :func:`build_training`.
        data_iterators: micro-batches for this data-parallel rank, ``num_microbatches`` of them.
    """
    measured = compute_gradients(training, data_iterators)
    return finish_step(training, measured, update=measured.is_finite)


def compute_gradients(training: Training, data_iterators: DataIterators) -> Measured:
    """Forward and backward on one global batch: gradients summed over ranks, and their norm. Collective."""
    for chunk in training.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    training.optimizer.zero_grad()
    clear_trackers()
    reports = _run_schedule(training, data_iterators, training.num_microbatches, forward_only=False)
    overflow = training.optimizer.prepare_grads()
    grad_norm = training.optimizer.get_grad_norm()
    loss, num_tokens = _reduce(training, reports)
    return Measured(
        loss=loss,
        grad_norm=math.inf if overflow else float(grad_norm),
        num_tokens=num_tokens,
        mtp_loss=mtp_loss(training),
        load_balancing_loss=load_balancing_loss(training),
    )


def finish_step(training: Training, measured: Measured, *, update: bool) -> StepResult:
    """Clip the gradients that were computed last, and update weights and learning rate, unless the step is left out."""
    learning_rate = float(training.optimizer.param_groups[0]["lr"])
    if update:
        _clip(training, measured.grad_norm)
        update = bool(training.optimizer.step_with_ready_grads())
    if update:
        training.scheduler.step(increment=1)
    return StepResult(
        loss=measured.loss,
        grad_norm=measured.grad_norm,
        num_tokens=measured.num_tokens,
        learning_rate=learning_rate,
        skipped=not update,
        mtp_loss=measured.mtp_loss,
        load_balancing_loss=measured.load_balancing_loss,
    )


def _clip(training: Training, grad_norm: float) -> None:
    """As Megatron's ``optimizer.step`` does between the two calls that are made here separately."""
    limit = training.config.optimizer.clip_grad
    for optimizer in getattr(training.optimizer, "chained_optimizers", [training.optimizer]):
        parameters = [] if getattr(optimizer, "is_stub_optimizer", False) else optimizer.get_parameters()
        if limit > 0 and parameters:
            clip_grad_by_total_norm_fp32(parameters, max_norm=limit, total_norm=grad_norm)


def evaluate(
    training: Training,
    data_iterators: DataIterators,
    num_batches: int,
    interrupted: Callable[[], bool] = lambda: False,
) -> EvalResult:
    """The loss on ``num_batches`` global batches, without gradients or dropout. Collective over all ranks.

    ``interrupted`` is asked between batches and must give all ranks the same answer. If it is true, the remaining
    batches are left out.
    """
    reports: list[torch.Tensor] = []
    complete = True
    with _evaluating(training):
        for batch in range(num_batches):
            complete = batch == 0 or not interrupted()
            if not complete:
                break
            reports += _run_schedule(training, data_iterators, training.num_microbatches, forward_only=True)
    loss, num_tokens = _reduce(training, reports)
    return EvalResult(loss=loss, num_tokens=num_tokens, complete=complete)


def reports_of(
    training: Training, data_iterators: DataIterators, num_batches: int, report: Report
) -> list[torch.Tensor]:
    """What ``report`` makes of every micro-batch on this rank, without gradients or dropout. Collective over all ranks.

    Args:
        training: from :func:`build_training`.
        data_iterators: as for :func:`train_step`.
        num_batches: global batches.
        report: called where losses are computed: on the last pipeline stage.
    """

    def loss(given: Given, token_losses: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return token_losses.sum(), torch.ones((), dtype=torch.int), report(given, token_losses)

    found: list[torch.Tensor] = []
    with _evaluating(training):
        for _ in range(num_batches):
            found += _run_schedule(
                training, data_iterators, training.num_microbatches, forward_only=True, loss=loss
            )
    return found


@contextmanager
def _evaluating(training: Training) -> Iterator[None]:
    # Megatron's schedules build a graph even if they only run forward.
    with torch.no_grad(), parameters_in_place(training):
        for chunk in training.chunks:
            chunk.eval()
        yield
        for chunk in training.chunks:
            chunk.train()


@contextmanager
def parameters_in_place(training: Training) -> Iterator[None]:
    """Inside the block every rank has the parameters of the last step, which evaluating and saving need.

    With ``overlap_param_gather`` they would arrive only during the next training forward pass.
    """
    overlapped = training.chunks if training.config.parallel.overlap_param_gather else []
    for chunk in overlapped:
        chunk.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for chunk in overlapped:
            chunk.enable_forward_pre_hook()


def _run_schedule(
    training: Training,
    data_iterators: DataIterators,
    num_microbatches: int,
    *,
    forward_only: bool,
    loss: Callable[..., Any] | None = None,
) -> list[torch.Tensor]:
    """Megatron's schedule; ``loss`` takes this rank's tensors and losses (B, S), default: see :func:`_loss`."""
    config, settings = training.config, training.config.training
    iterators = data_iterators
    if len(training.chunks) == 1 and isinstance(data_iterators, Sequence):
        iterators = data_iterators[0]
    reports: list[torch.Tensor] = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, training, loss or partial(_loss_of, training)),
        data_iterator=iterators,
        model=training.chunks if len(training.chunks) > 1 else training.chunks[0],
        num_microbatches=num_microbatches,
        seq_length=config.joined_seq_length,
        micro_batch_size=settings.micro_batch_size * settings.seq_length // config.joined_seq_length,
        decoder_seq_length=config.joined_seq_length,
        forward_only=forward_only,
    )
    return reports


def _forward_step(
    training: Training, loss: Callable[..., Any], iterator: Iterator[Batch], chunk: torch.nn.Module
) -> tuple[torch.Tensor, Any]:
    """Megatron's ``forward_step_func``: the chunk's output, and the function that turns it into a loss."""
    model = gpt_model(chunk)
    embeds = model.pre_process or model.mtp_process
    wanted = (*(_MODEL_INPUTS if embeds else ()), *(_LOSS_INPUTS if model.post_process else ()))
    shard: dict[str, torch.Tensor | None] = {}
    documents = Documents()
    if wanted or training.config.data.packed:  # else stages in the middle receive hidden states only
        batch = next(iterator)
        documents = documents_of(training, batch)
        shard = _shard(training, batch, wanted, documents)
    # The model's own loss mask serves multi-token prediction only.
    extras = {"loss_mask": documents.within(shard["loss_mask"])} if model.mtp_process else {}
    if documents.params is not None:
        extras["packed_seq_params"] = documents.params
    output = chunk(
        shard.get("tokens"),
        shard.get("position_ids"),
        documents.hidden,
        labels=shard.get("labels"),
        **extras,
    )
    return output, partial(loss, shard)


def _shard(
    training: Training, batch: Batch, wanted: Sequence[str], documents: Documents
) -> dict[str, torch.Tensor | None]:
    """The wanted entries of a micro-batch on the device, cut for this rank if they are not yet."""
    given: dict[str, torch.Tensor | None] = {
        name: batch[name].to(training.device, non_blocking=True) for name in wanted
    }
    given = documents.joined(given)
    rank, cut = rank_in(training.groups.cp), batch.get("shard")
    if cut is not None:
        return adopt_shard(given, cut, training.layout, rank)
    return shard_batch(given, training.layout, rank)


def _loss_of(training: Training, given: Given, token_losses: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return _loss(training, given.get("loss_mask"), token_losses)


def _loss(
    training: Training,
    loss_mask: torch.Tensor | None,
    token_losses: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Megatron's ``loss_func``: (loss to differentiate, its divisor, report).

    Args:
        training: its configuration says which average is wanted.
        loss_mask: (B, S), for this rank's tokens; 0 where a token does not count.
        token_losses: (B, S).

    Returns:
        The sum of this rank's losses, the divisor (int), and [numerator, denominator, tokens] in fp64, to be summed
        over micro-batches and over data- and context-parallel ranks.
    """
    assert loss_mask is not None  # only the last stage gets here, and it has read it
    loss_sum = (token_losses.float() * loss_mask).sum()
    tokens = loss_mask.sum()
    if training.config.training.calculate_per_token_loss:
        report = torch.stack([loss_sum.detach(), tokens, tokens]).double()
        return loss_sum, tokens.int(), report
    # Megatron divides by the tokens, the micro-batches, and the data and context parallel ranks. The latter hold parts
    # of one micro-batch, whose losses are added, not averaged.
    cp_size = size_of(training.groups.cp)
    all_tokens = tokens.clone()
    if cp_size > 1:
        dist.all_reduce(all_tokens, group=training.groups.cp)
    all_tokens.clamp_(min=1)
    mean_share = loss_sum.detach() / all_tokens
    report = torch.stack([mean_share, torch.full_like(mean_share, 1 / cp_size), tokens]).double()
    return loss_sum * cp_size, all_tokens.int(), report


def _reduce(training: Training, reports: list[torch.Tensor]) -> tuple[float, int]:
    """Mean loss and token count of all ranks' reports, on every rank."""
    total = torch.zeros(3, dtype=torch.float64, device=training.device)
    if reports:
        total += torch.stack(reports).sum(0)
    if training.is_last_stage:
        dist.all_reduce(total, group=training.collection.dp_cp)
    numerator, denominator, tokens = from_last_stage(training, total).tolist()
    return numerator / max(denominator, 1e-12), int(tokens)
