"""The optimizer's state as Megatron's sharded state dict, and back; torch's AdamW included.

Megatron-Core 0.16.1 can save the state of its DistributedOptimizer over ``torch.optim.AdamW``, but not load it (this
happens if neither Transformer Engine nor apex provides the optimizer): it expects state that torch creates in the first
step, then looks for the step count among tensors that do not contain it, and gives all parameters the same step tensor,
which each of them would increment. The functions here wrap Megatron's own methods, supply what is missing, and leave
FusedAdam alone.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

SHARDING: dict[str, Any] = {
    # In terms of the model's parameters, so that it can be loaded with any parallel sizes.
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}


def sharded_optimizer_state(
    optimizer: Any, model_state: dict[str, Any], *, is_loading: bool
) -> dict[str, Any]:
    """Megatron's sharded state dict of the optimizer.

    Args:
        optimizer: a MegatronOptimizer.
        model_state: the model's sharded state dict, which names the parameters.
        is_loading: whether it is a template to load into. Missing state is created as zeros.
    """
    for part in _parts(optimizer):
        _make_state(part.optimizer)  # when saving, too: the run may have stopped before its first step
    # When loading, Megatron creates the state of Adam, but fails on SGD, whose state already exists.
    template = is_loading and not any(
        isinstance(part.optimizer, torch.optim.SGD) for part in _parts(optimizer)
    )
    state: dict[str, Any] = optimizer.sharded_state_dict(model_state, template, metadata=dict(SHARDING))
    return state


@torch.no_grad()
def load_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Load what :func:`sharded_optimizer_state` described and the checkpoint filled in.

    Tensors and step counts are the checkpoint's; settings (learning rates, betas, epsilon) stay the optimizer's own.
    """
    parts = _parts(optimizer)
    settings = [[_settings(group) for group in part.param_groups] for part in parts]
    for part, part_state in zip(parts, _by_part(parts, state), strict=True):
        _take_own_rates(part, part_state)
        if isinstance(part, DistributedOptimizer):
            _load_distributed(part, part_state)
        else:
            _restore_zero_step(part.optimizer, part_state)
            part.load_state_dict(part_state)
    for part, groups in zip(parts, settings, strict=True):
        for group, own in zip(part.param_groups, groups, strict=True):
            group.update(own)


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """The settings of a parameter group, which Megatron and torch would overwrite with the checkpoint's."""
    return {key: value for key, value in group.items() if key not in ("params", "step")}


def _take_own_rates(part: Any, part_state: dict[str, Any]) -> None:
    """Give the checkpoint's groups this optimizer's rates: from 0.19 on, Megatron finds groups by their rates too."""
    own: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for group in part.param_groups:
        own.setdefault(_kind(group), []).append(group)
    for group in _inner(part_state).get("param_groups", []):
        counterparts = own.get(_kind(group), [])
        if len(counterparts) == 1:
            group.update(
                {key: counterparts[0][key] for key in _RATES if key in counterparts[0] and key in group}
            )


_RATES = ("max_lr", "min_lr", "start_wd", "end_wd")
_KINDS = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")


def _kind(group: dict[str, Any]) -> tuple[Any, ...]:
    """What distinguishes the parameter groups of one optimizer, whatever its rates."""
    return tuple(group.get(key, group.get(f"pre_{key}")) for key in _KINDS)


def _parts(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _by_part(parts: list[Any], state: dict[Any, Any]) -> list[dict[str, Any]]:
    """The state of each chained optimizer; experts that are spread over ranks have their own.

    The ranks that saved a checkpoint may have chained a different number of optimizers. Tensors are matched to their
    parameters by name; what applies to all parameters together (above all the step count) is where the saved chain had
    it.
    """
    saved = [state[index] for index in sorted(key for key in state if isinstance(key, int))]
    own = {key: value for key, value in state.items() if not isinstance(key, int)}
    wanted, others = ([own], saved) if len(parts) == 1 else (saved, [own])
    donor = next((part_state for part_state in (*others, *wanted) if _has_settings(part_state)), None)
    for part, part_state in zip(parts, wanted, strict=True):
        if donor is not None and not _has_settings(part_state):
            _complete(part, part_state, donor)
    return wanted


def _inner(part_state: dict[str, Any]) -> dict[str, Any]:
    """The state of torch's optimizer, which Megatron's optimizers for low precision and for shards wrap."""
    found: dict[str, Any] = part_state.get("optimizer", part_state)
    return found


def _has_settings(part_state: dict[str, Any]) -> bool:
    groups = _inner(part_state).get("param_groups", [])
    return bool(groups) and all("wd_mult" in group for group in groups)


def _complete(part: Any, part_state: dict[str, Any], donor: dict[str, Any]) -> None:
    """Complete a state with this optimizer's settings and the step count of another optimizer in the checkpoint."""
    if "optimizer" in donor:
        part_state.setdefault("optimizer", {})
    inner, given = _inner(part_state), _inner(donor)
    groups = inner.get("param_groups") or [{"params": []} for _ in part.param_groups]
    steps = {key: given["param_groups"][0][key] for key in ("step",) if key in given["param_groups"][0]}
    inner["param_groups"] = [
        {**_settings(own), **steps, "params": group["params"]}
        for own, group in zip(part.param_groups, groups, strict=True)
    ]
    if "common_step" in given.get("state", {}):
        inner.setdefault("state", {})["common_step"] = given["state"]["common_step"]


def _load_distributed(part: Any, state: dict[str, Any]) -> None:
    """Load step count and groups first, then the tensors; meanwhile the step count is kept away from Megatron."""
    tensors = state.pop("param_state")
    state.pop("param_state_sharding_type", None)
    part.load_state_dict(state)
    inner = part.optimizer.state
    steps = {param: inner[param].pop("step") for param in inner if "step" in inner[param]}
    part.load_parameter_state_from_fully_reshardable(tensors)
    for param, step in steps.items():
        inner[param]["step"] = step.clone()


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """Create the state that torch's AdamW or SGD would create in its first step."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if optimizer.state[param]:
                continue
            if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
                optimizer.state[param] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(param),
                    "exp_avg_sq": torch.zeros_like(param),
                }
            elif isinstance(optimizer, torch.optim.SGD) and group["momentum"]:
                optimizer.state[param] = {"momentum_buffer": torch.zeros_like(param)}


def _restore_zero_step(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Add the step count of zero, which Megatron does not save and AdamW needs."""
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        by_param = state.get("optimizer", state)["state"]
        by_param.setdefault("common_step", torch.tensor(0.0))
