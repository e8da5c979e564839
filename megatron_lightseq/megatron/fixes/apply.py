"""Fixes of Megatron-Core, applied to a built model."""

from __future__ import annotations

import torch

from megatron_lightseq.megatron.fixes.checkpointed_tokens import checkpoint_multi_token_layers
from megatron_lightseq.megatron.fixes.dispatch import release_dispatched_tokens
from megatron_lightseq.megatron.fixes.experts import weigh_auxiliary_losses
from megatron_lightseq.megatron.fixes.latent_attention import sum_shared_keys
from megatron_lightseq.megatron.fixes.routing import route_whole_micro_batches


def fix_model(model: torch.nn.Module) -> None:
    """Make a model get the same gradients on several ranks as on one, and be freed; a second call does nothing.

    * Mixture of experts: routing that counts tokens counts those of all ranks that share a micro-batch
      (:func:`route_whole_micro_batches`).
    * Mixture of experts: the router's auxiliary losses (load balancing, z-loss) keep their weight, however tokens are
      cut over ranks and micro-batches (:func:`weigh_auxiliary_losses`).
    * Latent attention from Megatron's local layers, under tensor parallelism: the gradient of the keys that all heads
      share is summed (:func:`sum_shared_keys`).
    * Mixture of experts: a model that is no longer used can be freed (:func:`release_dispatched_tokens`).

    * Multi-token prediction: its layers can be recomputed (:func:`checkpoint_multi_token_layers`).

    :func:`megatron_lightseq.megatron.adopt_layout` calls it. Modules outside of ``model`` do not change.
    """
    route_whole_micro_batches(model)
    weigh_auxiliary_losses(model)
    sum_shared_keys(model)
    release_dispatched_tokens(model)
    checkpoint_multi_token_layers(model)
