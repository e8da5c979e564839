"""Routing to experts where no token has a value: every expert gets the same number of tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def count_balanced(dispatcher: Any, routing_map: torch.Tensor) -> np.ndarray:
    """In place of ``MoEAlltoAllTokenDispatcher.preprocess``: the same counts, for balanced routing.

    The counts are arrays of numpy, because Megatron asks for their values, which fake tensors do not have.

    Args:
        dispatcher: receives the sizes of its all-to-all and the order of its pieces.
        routing_map: (tokens, experts), of which only the shape counts.

    Returns:
        Tokens of every local expert.
    """
    routed, experts = routing_map.shape[0] * dispatcher.config.moe_router_topk, dispatcher.num_experts
    counts = np.full(experts, routed // experts)
    counts[: routed % experts] += 1
    first, last = dispatcher.local_expert_indices[0], dispatcher.local_expert_indices[-1]
    local, senders = counts[first : last + 1], dispatcher.ep_size * dispatcher.tp_size
    dispatcher.num_out_tokens = routed
    if senders > 1:
        received = int(local.sum())
        dispatcher.input_splits = counts.reshape(dispatcher.ep_size, -1).sum(1)
        dispatcher.output_splits = np.full(dispatcher.ep_size, received)
        dispatcher.output_splits_tp = np.full(dispatcher.tp_size, received * dispatcher.ep_size)
    if dispatcher.num_local_experts > 1:
        pieces = np.arange(experts * dispatcher.tp_size)
        dispatcher.sort_input_by_local_experts = pieces.reshape(-1, len(local)).T.ravel()
        dispatcher.restore_output_by_local_experts = pieces.reshape(len(local), -1).T.ravel()
        dispatcher.num_global_tokens_per_local_expert = np.tile(local, (senders, 1))
    dispatcher._maybe_update_cuda_sync_point("before_ep_alltoall")
    return local * senders


def routed_tokens(mask: torch.Tensor, topk: int) -> int:
    """How many elements of a routing map are set, either way round."""
    return max(mask.shape) * topk
