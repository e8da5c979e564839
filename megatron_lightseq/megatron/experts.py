"""Mixtures of experts that train alike on any number of ranks.

Two places of Megatron's depend on how ranks are cut: the order in which expert weights are drawn, and the weight of
the load balancing loss. Both are replaced in a layer's specification; tokens, router and experts stay Megatron's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_lightseq.megatron.seeded_init import WeightNames


class NamedExperts(SequentialMLP):
    """Megatron's local experts, whose initial weights are those of their number among all experts."""

    def __init__(
        self,
        num_local_experts: int,
        config: Any,
        submodules: Any,
        pg_collection: Any = None,
        *,
        weight_names: WeightNames,
    ) -> None:
        with weight_names.building_experts(pg_collection.ep.rank() * num_local_experts):
            super().__init__(num_local_experts, config, submodules, pg_collection=pg_collection)


class WholeBatchRouter(TopKRouter):
    """A router whose load balancing loss weighs the same however tokens are cut over ranks.

    With ``calculate_per_token_loss`` gradients are divided by all tokens in the end. Each tensor- or context-parallel
    rank adds its share of the loss, which Megatron multiplies by the rank's own tokens (transformer/moe/router.py):
    over P ranks the loss would weigh 1/P of what it does on one.
    """

    def set_layer_number(self, layer_number: int) -> None:
        """Not taken, so nothing is entered in Megatron's books: one for a process, as long as its first model."""

    def attach_and_log_load_balancing_loss(
        self,
        activation: torch.Tensor,
        aux_loss_coeff: float,
        aux_loss: torch.Tensor,
        aux_loss_name: str,
        reduce_group: Any,
        *args: Any,
        valid_token_count: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Megatron's, with the tokens of all ranks of ``reduce_group``; shapes as there."""
        tokens = activation.shape[0] if valid_token_count is None else valid_token_count
        attached: torch.Tensor = super().attach_and_log_load_balancing_loss(
            activation,
            aux_loss_coeff,
            aux_loss,
            aux_loss_name,
            reduce_group,
            *args,
            valid_token_count=tokens * reduce_group.size(),
            **kwargs,
        )
        return attached


def with_invariant_experts(layer: ModuleSpec, names: WeightNames) -> ModuleSpec:
    """A layer specification whose experts, if it has any, are drawn by name and balanced over the whole batch."""
    moe = layer.submodules.mlp
    if moe.module is not MoELayer:
        return layer
    experts = moe.submodules.experts
    if experts.module is SequentialMLP:  # the grouped kernels draw their weights on the device
        experts = replace(experts, module=NamedExperts, params={**experts.params, "weight_names": names})
    parts = replace(moe.submodules, experts=experts, router=WholeBatchRouter)
    return replace(layer, submodules=replace(layer.submodules, mlp=replace(moe, submodules=parts)))
