"""The loss by position: how much a model gains from the tokens before, and how far back it can use them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from megatron_lightseq.training.auxiliary_losses import from_last_stage
from megatron_lightseq.training.setup import Training
from megatron_lightseq.training.step import DataIterators, Given, reports_of


@dataclass(frozen=True, slots=True)
class Bucket:
    """Adjacent positions of sequences."""

    first: int
    """Position of the first token that is read; its label is the next one."""
    last: int
    """Position of the last one."""
    num_tokens: int
    """Unmasked labels."""
    loss: float | None
    """Mean loss in nats per label; None if there is none."""


def loss_by_position(
    training: Training, data_iterators: DataIterators, num_batches: int, num_buckets: int
) -> list[Bucket]:
    """The mean loss of each of ``num_buckets`` equal ranges of positions. Collective over all ranks.

    Positions are those that the model is given: with ``reset_position_ids`` they restart with every document.

    Args:
        training: from :func:`~megatron_lightseq.training.setup.build_training`.
        data_iterators: whole sequences for this data-parallel rank.
        num_batches: global batches to read.
        num_buckets: at most ``seq_length``.
    """
    length = training.config.training.seq_length
    reports = reports_of(training, data_iterators, num_batches, partial(_report, num_buckets, length))
    total = torch.zeros(2, num_buckets, dtype=torch.float64, device=training.device)
    if reports:
        total += torch.stack(reports).sum(0)
    if training.is_last_stage:
        dist.all_reduce(total, group=training.collection.dp_cp)
    sums, counts = from_last_stage(training, total).tolist()
    starts = [-(-length * index // num_buckets) for index in range(num_buckets + 1)]
    return [
        Bucket(first, following - 1, int(count), loss / count if count else None)
        for first, following, loss, count in zip(starts, starts[1:], sums, counts, strict=False)
    ]


def _report(num_buckets: int, length: int, given: Given, token_losses: torch.Tensor) -> torch.Tensor:
    """(2, num_buckets) fp64: sums of losses and numbers of labels of one micro-batch on one rank."""
    bucket = (given["position_ids"] * num_buckets // length).flatten()
    mask = given["loss_mask"].double().flatten()
    found = torch.zeros(2, num_buckets, dtype=torch.float64, device=token_losses.device)
    # A masked loss may be infinite, and 0 * inf is NaN.
    losses = torch.where(mask > 0, token_losses.double().flatten() * mask, 0.0)
    found[0].index_add_(0, bucket, losses)
    found[1].index_add_(0, bucket, mask)
    return found
