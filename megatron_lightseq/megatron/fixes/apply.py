"""Gradients that Megatron gets wrong on several ranks, whatever computes attention: put right on finished models."""

from __future__ import annotations

import torch

from megatron_lightseq.megatron.fixes.experts import weigh_whole_batches
from megatron_lightseq.megatron.fixes.latent_attention import sum_shared_keys


def mend_gradients(model: torch.nn.Module) -> None:
    """Have a model train on several ranks as on one; a second call does nothing.

    * mixture of experts: the load balancing loss weighs the same (:func:`weigh_whole_batches`);
    * latent attention of Megatron's own layers under tensor parallelism: the gradient of the keys that all heads share
      is summed (:func:`sum_shared_keys`).

    :func:`megatron_lightseq.megatron.adopt_layout` calls it. Modules outside ``model`` stay as they are.
    """
    weigh_whole_batches(model)
    sum_shared_keys(model)
