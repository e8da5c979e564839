"""A check before a checkpoint is written: NaN and infinity in it would spoil every later run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist

from megatron_lightseq.errors import SpoiledStateError, explain
from megatron_lightseq.training.setup import Training

_SHOWN = 3


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], group: dist.ProcessGroup | None = None) -> None:
    """Return if all tensors of all ranks, given with their names, are finite. Collective over ``group``.

    Raises:
        SpoiledStateError: they are not; the message names some, and every rank raises it.
    """
    flags = [(name, torch.isfinite(tensor).all()) for name, tensor in tensors]
    whole = bool(torch.stack([flag for _, flag in flags]).all()) if flags else True
    own = [] if whole else [name for name, flag in flags if not bool(flag)][:_SHOWN]
    known: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(known, own, group=group)
    bad = [f"{name} of rank {rank}" for rank, names in enumerate(known) for name in names]
    if bad:
        raise SpoiledStateError(
            explain(
                got=f"not saved: {', '.join(bad[:_SHOWN])} not finite",
                rule="a checkpoint with NaN or infinity would spoil every run that resumes from it",
                remedy="Restart: the run continues from its last checkpoint. Test the memory of that rank's host",
            )
        )


def tensors_of(training: Training) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight and all optimizer state of this rank, with names."""
    for model in training.models:
        for name, parameter in model.named_parameters():
            yield f"weights {name}", parameter.detach()
    for optimizer in getattr(training.optimizer, "chained_optimizers", [training.optimizer]):
        if getattr(optimizer, "is_stub_optimizer", False):
            continue
        for group in optimizer.optimizer.param_groups:
            for number, parameter in enumerate(group["params"]):
                yield f"master weights {number}", parameter.detach()
        for number, state in enumerate(optimizer.optimizer.state.values()):
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    yield f"optimizer state {key} of parameter {number}", value
