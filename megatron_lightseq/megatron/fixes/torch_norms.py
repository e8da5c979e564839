"""Sequence parallelism with torch's own norms.

Megatron refuses it (transformer/torch_norm.py), because torch's norms do not mark their weights for the gradient
all-reduce over the tensor-parallel group (distributed/finalize_model_grads.py). Marking them is enough. With
Transformer Engine or apex, Megatron uses their norms, which mark them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.torch_norm import WrappedTorchNorm


def allow_sequence_parallel() -> Callable[[], None]:
    """Let Megatron build torch norms under sequence parallelism, in this process; a second call does nothing.

    Returns:
        A function that undoes it.
    """
    original = WrappedTorchNorm.__new__
    if hasattr(original, "marks_sequence_parallel"):
        return lambda: None

    def build(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        sequence_parallel = config.sequence_parallel
        config.sequence_parallel = False
        try:
            norm: torch.nn.Module = original(cls, config, *args, **kwargs)
        finally:
            config.sequence_parallel = sequence_parallel
        for parameter in norm.parameters():
            parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
        return norm

    build.marks_sequence_parallel = True  # type: ignore[attr-defined]
    WrappedTorchNorm.__new__ = staticmethod(build)

    def undo() -> None:
        WrappedTorchNorm.__new__ = staticmethod(original)

    return undo
