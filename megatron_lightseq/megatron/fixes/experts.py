"""Mixtures of experts that train alike on any number of ranks.

Two places of Megatron's depend on how ranks are cut: the order in which expert weights are drawn, which a layer's
specification replaces, and the weight of the load balancing loss, which is mended on finished models.
"""

from __future__ import annotations

from dataclasses import replace
from types import MethodType
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


def weigh_whole_batches(model: torch.nn.Module) -> int:
    """Have every router below ``model`` weigh its load balancing loss alike, however tokens are cut over ranks.

    With ``calculate_per_token_loss`` gradients are divided by all tokens in the end. Each tensor- or context-parallel
    rank adds its share of the loss, which Megatron-Core until 0.18 multiplies by the rank's own tokens
    (transformer/moe/router.py): over P ranks the loss would weigh 1/P of what it does on one. From 0.19 on it
    multiplies by P, as is done here, and its routers are left alone. A second call does nothing.

    Returns:
        How many routers were changed.
    """
    method = TopKRouter.attach_and_log_load_balancing_loss
    if "tp_cp_group" in method.__code__.co_names:
        return 0
    routers = [
        module
        for module in model.modules()
        if isinstance(module, TopKRouter) and method.__name__ not in vars(module)
    ]
    for router in routers:
        setattr(router, method.__name__, MethodType(_attach_for_whole_batch, router))
    return len(routers)


def _attach_for_whole_batch(
    router: TopKRouter,
    activation: torch.Tensor,
    aux_loss_coeff: float,
    aux_loss: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """Megatron's method; it logs the loss divided by its coefficient, so both grow."""
    ranks = router.tp_cp_group.size() if router.calculate_per_token_loss else 1
    attached: torch.Tensor = type(router).attach_and_log_load_balancing_loss(
        router, activation, ranks * aux_loss_coeff, ranks * aux_loss, *args, **kwargs
    )
    return attached


def with_invariant_experts(layer: ModuleSpec, names: WeightNames) -> ModuleSpec:
    """A layer specification whose experts, if it has any, are drawn by name."""
    moe = layer.submodules.mlp
    if moe.module is not MoELayer:
        return layer
    experts = moe.submodules.experts
    if experts.module is SequentialMLP:  # the grouped kernels draw their weights on the device
        experts = replace(experts, module=NamedExperts, params={**experts.params, "weight_names": names})
    parts = replace(moe.submodules, experts=experts)
    return replace(layer, submodules=replace(layer.submodules, mlp=replace(moe, submodules=parts)))
