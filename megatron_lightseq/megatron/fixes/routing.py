"""Routing that counts tokens counts those of the whole micro-batch, not a rank's own.

Two kinds of Megatron's routing depend on which tokens are routed together: ``sinkhorn`` balances experts over them, and
``moe_expert_capacity_factor`` drops tokens beyond a number per expert. Megatron's routers see the tokens of one rank,
so that both would depend on how many tensor- and context-parallel ranks share a micro-batch. Here the ranks exchange
what they know of every token: float32 per token and expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter

from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.megatron.fixes.rebind import rebind


@dataclass(frozen=True, slots=True)
class _Gathered:
    """The tokens of all ranks that share a micro-batch; every rank holds equally many."""

    group: dist.ProcessGroup

    def of(self, local: torch.Tensor) -> torch.Tensor:
        """(T, experts) of this rank to (T * ranks, experts), in the order of the ranks. Collective."""
        parts = [torch.empty_like(local) for _ in range(self.group.size())]
        dist.all_gather(parts, local.contiguous(), group=self.group)
        return torch.cat(parts)

    def own(self, whole: torch.Tensor) -> torch.Tensor:
        """The inverse: this rank's part."""
        return whole.chunk(self.group.size())[self.group.rank()]


class Sinkhorn(_Gathered):
    """In place of Megatron's ``sinkhorn``, for one router."""

    def __call__(self, cost: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(T, experts) float32, without gradient, to the same: balanced over the tokens of all ranks."""
        balanced: torch.Tensor = moe_utils.sinkhorn(self.of(cost), *args, **kwargs)
        return self.own(balanced)


class TokenDropping(_Gathered):
    """In place of Megatron's ``apply_router_token_dropping``, for one router that drops by probability."""

    def __call__(
        self, routing_probs: torch.Tensor, routing_map: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, experts) probabilities and whether an expert was chosen, to the same without the dropped ones."""
        with torch.no_grad():
            probs, chosen = self.of(routing_probs.detach()), self.of(routing_map)
            _, kept = moe_utils.apply_router_token_dropping(probs, chosen, *args, **kwargs)
            mine = self.own(kept)
        return routing_probs * mine, mine


def route_whole_micro_batches(model: torch.nn.Module) -> int:
    """Make every router below ``model`` that counts tokens count those of all ranks that share a micro-batch.

    Nothing changes on one such rank, for routing that looks at one token at a time, and in a second call.

    Returns:
        The number of routers that were changed.

    Raises:
        UnsupportedError: this Megatron-Core routes in a way that is not known here.
    """
    found = 0
    for router in (module for module in model.modules() if isinstance(module, TopKRouter)):
        replacements = _replacements(router)
        if hasattr(router, _FIXED) or not replacements or router.tp_cp_group.size() == 1:
            continue
        for name, replacement in replacements.items():
            if not rebind(router, name, replacement):
                raise _unknown(name)
        setattr(router, _FIXED, True)
        found += 1
    return found


_FIXED = "routes_whole_micro_batches"


def _replacements(router: TopKRouter) -> dict[str, _Gathered]:
    """What a router's methods call, and what they call instead."""
    kinds, group = router.config.moe_router_load_balancing_type, router.tp_cp_group
    found: dict[str, _Gathered] = {}
    if "sinkhorn" in (kinds if isinstance(kinds, list) else [kinds]):
        found["sinkhorn"] = Sinkhorn(group)
    if router.config.moe_expert_capacity_factor is not None:
        found["apply_router_token_dropping"] = TokenDropping(group)
    return found


def _unknown(name: str) -> UnsupportedError:
    return UnsupportedError(
        explain(
            got=f"a router without Megatron-Core's {name}",
            rule="routing that counts tokens must count those of the whole micro-batch, and this version does it in a "
            "way that is not known here",
            remedy="Use context_parallel_size 1 and tensor_model_parallel_size 1, or Megatron-Core 0.16.1",
        )
    )
