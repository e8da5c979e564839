"""Mixtures of experts that train the same way on any number of ranks.

Two things in Megatron-Core depend on how tokens and experts are split: the order in which initial weights of experts
are drawn, which is fixed by a layer specification, and the weight of the router's auxiliary losses, which is fixed on
built models.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import megatron.core
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_lightseq.megatron.fixes.rebind import rebind
from megatron_lightseq.megatron.layer_parts import changed_part, part_class, part_submodules
from megatron_lightseq.megatron.seeded_init import WeightNames


class NamedExperts(SequentialMLP):
    """Megatron's local experts, with initial weights that depend on their number among all experts."""

    def __init__(
        self,
        num_local_experts: int,
        config: Any,
        submodules: Any,
        pg_collection: Any = None,
        *,
        weight_names: WeightNames,
        **others: Any,
    ) -> None:
        """``others``: arguments that newer versions have."""
        with weight_names.building_experts(pg_collection.ep.rank() * num_local_experts):
            super().__init__(num_local_experts, config, submodules, pg_collection=pg_collection, **others)
        for expert in self.local_experts if config.add_bias_linear else ():
            expert.linear_fc2.register_forward_hook(_own_memory)


def _own_memory(module: torch.nn.Module, args: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    """A forward hook: the output as a tensor of its own.

    Megatron adds the bias to it in place (transformer/mlp.py), which autograd refuses on one tensor-parallel rank,
    where it is a view that a custom function has returned.
    """
    del module, args
    return output[0].clone(), output[1]


def with_invariant_experts(layer: ModuleSpec, names: WeightNames) -> ModuleSpec:
    """A layer specification whose experts, if it has any, draw their initial weights by name."""
    moe = layer.submodules.mlp
    if part_class(moe) is not MoELayer:
        return layer
    parts = part_submodules(moe)
    if part_class(parts.experts) is SequentialMLP:  # grouped kernels draw their weights on the device
        parts = replace(parts, experts=changed_part(parts.experts, module=NamedExperts, weight_names=names))
    return replace(layer, submodules=replace(layer.submodules, mlp=changed_part(moe, submodules=parts)))


# --- auxiliary losses -------------------------------------------------------------------------------------------------


def weigh_auxiliary_losses(model: torch.nn.Module) -> int:
    """Give the auxiliary losses of every router below ``model`` the weight that they have on one rank.

    The load balancing losses (over a micro-batch, a sequence, or the global batch) and the z-loss are sums of parts
    that the P tensor- and context-parallel ranks compute from their own tokens. Megatron-Core weighs the parts
    incorrectly:

    * With ``calculate_per_token_loss``, gradients are finally divided by all tokens, so a loss must be multiplied by
      the tokens of its micro-batch. Up to 0.18 a rank multiplies by its own tokens only: all terms weigh 1/P, and the
      loss over sequences also 1 / micro_batch_size.
    * Without it, up to 0.15 all terms weigh 1 / context_parallel_size.
    * The loss over the global batch weighs 1 / data_parallel_size, in all versions.
    * With a padding mask, all terms depend on which rank holds the padding, in all versions.

    A second call does nothing.

    Returns:
        The number of routers that were changed.
    """
    routers = [
        module
        for module in model.modules()
        if isinstance(module, TopKRouter) and not hasattr(module, "auxiliary_losses")
    ]
    for router in routers:
        AuxiliaryLosses(router)
    return len(routers)


class AuxiliaryLosses:
    """Takes over how one router weighs its auxiliary losses; values and logs stay Megatron's.

    Megatron attaches each loss to an activation, with a factor for ``calculate_per_token_loss``. That factor is
    switched off in the router, and replaced by the right one here.
    """

    def __init__(self, router: TopKRouter) -> None:
        self._router = router
        self._routing = router.routing
        self._per_token: bool = router.calculate_per_token_loss
        self._total_tokens: int | Tensor = 0
        """Tokens of the micro-batch that are not padding, over all ranks that share it."""
        self._local_share: float | Tensor = 1.0
        """This rank's number of them, relative to the mean over these ranks."""
        self._factor: float | Tensor = 1.0
        """Of the loss that is being computed, besides the common one."""
        rebind(router, "MoEAuxLossAutoScaler", self)
        self._attach, self._z_loss = router.attach_and_log_load_balancing_loss, router.apply_z_loss
        router.calculate_per_token_loss = False
        router.routing = self._count_and_route
        router.attach_and_log_load_balancing_loss = self._attach_load_balancing
        router.apply_z_loss = self._apply_z_loss
        router.auxiliary_losses = self

    def _count_and_route(self, logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        """In place of ``routing``: logits (S, B, experts), and from 0.16 on a padding mask, True at padding."""
        padding: Tensor | None = kwargs.get("padding_mask", args[0] if args else None)
        ranks = self._router.tp_cp_group.size()
        if padding is None:
            self._total_tokens, self._local_share = logits.shape[:2].numel() * ranks, 1.0
        else:
            local = (~padding).sum().float()
            total = local.clone()
            dist.all_reduce(total, group=self._router.tp_cp_group)
            self._total_tokens, self._local_share = total, local * ranks / total.clamp(min=1)
        return self._routing(logits, *args, **kwargs)

    def _attach_load_balancing(
        self, activation: Tensor, coeff: float, loss: Tensor, name: str, group: Any, *args: Any, **kwargs: Any
    ) -> Tensor:
        """In place of ``attach_and_log_load_balancing_loss``; parts of data-parallel ranks are summed."""
        self._factor = group.size() / self._router.tp_cp_group.size()
        attached: Tensor = self._attach(activation, coeff, loss, name, group, *args, **kwargs)
        return attached

    def _apply_z_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """In place of ``apply_z_loss``, which takes the mean over a rank's own tokens."""
        self._factor = self._local_share
        logits: Tensor = self._z_loss(*args, **kwargs)
        return logits

    def apply(self, activation: Tensor, loss: Tensor) -> Tensor:
        """In place of ``MoEAuxLossAutoScaler.apply``: attach a rank's part of a loss with its weight."""
        weight = self._factor * (self._total_tokens if self._per_token else _schedule_factor(self._router))
        attached: Tensor = MoEAuxLossAutoScaler.apply(activation, loss * weight)
        return attached


def _schedule_factor(router: TopKRouter) -> int:
    """What Megatron's schedules leave out of the scale of auxiliary losses (pipeline_parallel/schedules.py)."""
    major, minor = map(int, re.findall(r"\d+", megatron.core.__version__)[:2])
    return int(router.config.context_parallel_size) if (major, minor) < (0, 16) else 1
