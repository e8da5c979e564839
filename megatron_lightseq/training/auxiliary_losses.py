"""Auxiliary losses (multi-token prediction, MoE load balancing), read from Megatron's global loss trackers.

The trackers belong to the process and have one entry per layer of the first model that wrote to them. They are cleared
before every step, so that a model of another depth may follow.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from megatron_lightseq.training.setup import Training

_LOAD_BALANCING = {"aux_loss": "load_balancing_loss", "seq_aux_loss": "seq_load_balancing_loss"}


def clear_trackers() -> None:
    """Forget what an interrupted step, an evaluation or another model has left."""
    MTPLossLoggingHelper.tracker.clear()
    router_losses().clear()
    # Megatron writes to the last scale in place, which fails if that comes from an evaluation in inference mode.
    moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale = None


def router_losses() -> dict[str, Any]:
    """Megatron's own entry by name of the losses that routers have logged: a dictionary, or an object from 0.18 on."""
    try:
        logging = importlib.import_module("megatron.core.transformer.moe.moe_logging")
    except ImportError:
        tracker: dict[str, Any] = moe_utils.get_moe_layer_wise_logging_tracker()
        return tracker
    metrics: dict[str, Any] = logging.get_moe_metrics_tracker().metrics
    return metrics


def mtp_loss(training: Training) -> float | None:
    """The loss of multi-token prediction in this step, in nats per token, before its weight. Collective.

    Returns:
        The mean over the MTP layers and micro-batches, the same on every rank; None without multi-token prediction.
    """
    if training.config.model.mtp_num_layers is None:
        return None
    total = torch.zeros((), dtype=torch.float64, device=training.device)
    if training.is_last_stage:
        tracker = MTPLossLoggingHelper.tracker
        sums = tracker.pop("loss_values" if "loss_values" in tracker else "values")  # the former from 0.19 on
        total += sums.mean() / training.num_microbatches / training.collection.dp_cp.size()
        dist.all_reduce(total, group=training.collection.dp_cp)
    return float(from_last_stage(training, total).item())


def load_balancing_loss(training: Training) -> float | None:
    """The loss that Megatron-LM logs as load_balancing_loss, or seq_load_balancing_loss with seq_aux_loss. Collective.

    Returns:
        The loss before its coefficient, averaged over layers, micro-batches and data parallel ranks, the same on every
        rank; None without experts or without such a loss. It is 1 if all experts get equally many tokens.
    """
    model, experts = training.config.model, training.config.experts
    name = _LOAD_BALANCING.get(experts.moe_router_load_balancing_type)
    if experts.num_experts is None or experts.moe_aux_loss_coeff == 0 or name is None:
        return None
    groups = training.collection
    # One value per layer of this stage, for the tokens of this rank.
    shares = router_losses().pop(name)
    shares = shares["values"] if isinstance(shares, dict) else shares.values
    num_layers = model.num_layers + (model.mtp_num_layers or 0)
    total = shares.double().sum() / (num_layers * training.num_microbatches * groups.dp.size())
    for group in (groups.tp_cp, groups.pp, groups.dp):
        dist.all_reduce(total, group=group)
    return float(total.item())


def from_last_stage(training: Training, value: torch.Tensor) -> torch.Tensor:
    """Copy the last pipeline stage's value to every stage, in place. Collective."""
    pipeline = training.collection.pp
    if pipeline.size() > 1:
        dist.broadcast(value, src=dist.get_global_rank(pipeline, pipeline.size() - 1), group=pipeline)
    return value
