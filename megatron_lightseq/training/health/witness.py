"""Where numbers first stop being finite: watched while a bad step is repeated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

_SHOWN = 3
"""Ranks in a message."""


class Witness:
    """The first parameter, or else the first module output, of this rank that holds NaN or infinity."""

    def __init__(self) -> None:
        self.seen: str | None = None

    @contextmanager
    def watching(self, models: Sequence[torch.nn.Module]) -> Iterator[None]:
        """Look at all parameters, and inside the block at the outputs of all modules. It waits for every result."""
        for model in models:
            for name, parameter in model.named_parameters():
                self._look(f"weights {name}", parameter.detach())
        handles = [
            module.register_forward_hook(self._hook(name))
            for model in models
            for name, module in model.named_modules()
            if name
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def everyones(self) -> str:
        """What the ranks have seen, in words. Collective."""
        seen: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(seen, self.seen)
        found = [f"rank {rank}: {text}" for rank, text in enumerate(seen) if text is not None]
        return "; ".join(found[:_SHOWN]) or "no weight and no output of a module"

    def _hook(self, name: str) -> Any:
        def look(_module: torch.nn.Module, _inputs: Any, outputs: Any) -> None:
            for output in outputs if isinstance(outputs, tuple) else (outputs,):
                if isinstance(output, torch.Tensor):
                    self._look(f"output of {name}", output.detach())

        return look

    def _look(self, what: str, tensor: torch.Tensor) -> None:
        if self.seen is None and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            self.seen = what
