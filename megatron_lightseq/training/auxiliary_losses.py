"""Losses beside the next token's, which Megatron enters in books of its own while it computes them.

The books are the process's, with a line for each layer of the first model that wrote: they are emptied before every
step, so that models of other depths may follow.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from megatron_lightseq.training.setup import Training

_LOAD_BALANCING = {"aux_loss": "load_balancing_loss", "seq_aux_loss": "seq_load_balancing_loss"}


def clear_books() -> None:
    """Forget what a step that was broken off, or another model, has left."""
    MTPLossLoggingHelper.tracker.clear()
    get_moe_layer_wise_logging_tracker().clear()


def mtp_loss(training: Training) -> float | None:
    """What multi-token prediction has lost in this step, in nats per token, unweighted; on every rank, collective.

    Returns:
        The mean over further tokens and micro-batches; None without multi-token prediction.
    """
    if training.config.model.mtp_num_layers is None:
        return None
    total = torch.zeros((), dtype=torch.float64, device=training.device)
    if training.is_last_stage:
        sums = MTPLossLoggingHelper.tracker.pop("values")
        total += sums.mean() / training.num_microbatches / training.collection.dp_cp.size()
        dist.all_reduce(total, group=training.collection.dp_cp)
    return float(from_last_stage(training, total).item())


def load_balancing_loss(training: Training) -> float | None:
    """What Megatron-LM logs as load_balancing_loss (seq_aux_loss: seq_load_balancing_loss); on every rank, collective.

    Returns:
        The loss before its coefficient, mean over layers, micro-batches and data-parallel ranks; None where the
        experts have none. Experts that all get equally many tokens have a loss of 1.
    """
    model, experts = training.config.model, training.config.experts
    name = _LOAD_BALANCING.get(experts.moe_router_load_balancing_type)
    if experts.num_experts is None or experts.moe_aux_loss_coeff == 0 or name is None:
        return None
    groups = training.collection
    shares = get_moe_layer_wise_logging_tracker().pop(name)[
        "values"
    ]  # of this stage's layers and this rank's tokens
    num_layers = model.num_layers + (model.mtp_num_layers or 0)
    total = shares.double().sum() / (num_layers * training.num_microbatches * groups.dp.size())
    for group in (groups.tp_cp, groups.pp, groups.dp):
        dist.all_reduce(total, group=group)
    return float(total.item())


def from_last_stage(training: Training, value: torch.Tensor) -> torch.Tensor:
    """The last pipeline stage's value, on every stage; in place, collective."""
    pipeline = training.collection.pp
    if pipeline.size() > 1:
        dist.broadcast(value, src=dist.get_global_rank(pipeline, pipeline.size() - 1), group=pipeline)
    return value
