"""What Megatron does with torch's own norms only after a fix: sequence parallelism, and zero-centred weights.

Megatron refuses both (transformer/torch_norm.py). Sequence parallelism, because torch's norms do not mark their weights
for the gradient all-reduce over the tensor-parallel group (distributed/finalize_model_grads.py): marking them is
enough. Zero-centred weights, because torch has no such norms: they are here. With Transformer Engine or apex, Megatron
uses their norms, which can do both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.torch_norm import WrappedTorchNorm


class ZeroCentredRMSNorm(torch.nn.RMSNorm):
    """RMSNorm with the factor 1 + weight, computed in fp32 (or fp64), as in Gemma."""

    def reset_parameters(self) -> None:
        """The weight starts at 0."""
        torch.nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., normalized_shape) to the same, in x's dtype."""
        wide = torch.promote_types(x.dtype, torch.float32)
        factor = 1 + self.weight.to(wide)
        return torch.nn.functional.rms_norm(x.to(wide), self.normalized_shape, factor, self.eps).to(x.dtype)


class ZeroCentredLayerNorm(torch.nn.LayerNorm):
    """LayerNorm with the factor 1 + weight, computed in fp32 (or fp64)."""

    def reset_parameters(self) -> None:
        """Weight and bias start at 0."""
        torch.nn.init.zeros_(self.weight)
        torch.nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., normalized_shape) to the same, in x's dtype."""
        wide = torch.promote_types(x.dtype, torch.float32)
        factor, bias = 1 + self.weight.to(wide), self.bias.to(wide)
        return torch.nn.functional.layer_norm(x.to(wide), self.normalized_shape, factor, bias, self.eps).to(
            x.dtype
        )


_ZERO_CENTRED = {"RMSNorm": ZeroCentredRMSNorm, "LayerNorm": ZeroCentredLayerNorm}


def extend_torch_norms() -> Callable[[], None]:
    """Let Megatron build torch norms under sequence parallelism and with zero-centred weights, in this process.

    A second call does nothing.

    Returns:
        A function that undoes it.
    """
    original = WrappedTorchNorm.__new__
    if hasattr(original, "marks_sequence_parallel"):
        return lambda: None

    def build(
        cls: type, config: Any, hidden_size: int, eps: float = 1e-5, *args: Any, **kwargs: Any
    ) -> torch.nn.Module:
        sequence_parallel = config.sequence_parallel
        if config.layernorm_zero_centered_gamma and config.normalization in _ZERO_CENTRED:
            norm: torch.nn.Module = _ZERO_CENTRED[config.normalization](hidden_size, eps)
        else:
            norm = _without_sequence_parallel(
                config, lambda: original(cls, config, hidden_size, eps, *args, **kwargs)
            )
        for parameter in norm.parameters():
            parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
        return norm

    build.marks_sequence_parallel = True  # type: ignore[attr-defined]
    WrappedTorchNorm.__new__ = staticmethod(build)

    def undo() -> None:
        WrappedTorchNorm.__new__ = staticmethod(original)

    return undo


def _without_sequence_parallel(config: Any, build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    sequence_parallel, config.sequence_parallel = config.sequence_parallel, False
    try:
        return build()
    finally:
        config.sequence_parallel = sequence_parallel
