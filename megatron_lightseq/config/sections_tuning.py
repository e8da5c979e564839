"""Which parameters a run trains, where it does not train all of them.

Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LoraTarget = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TuningConfig:
    """Low-rank adapters (LoRA, arXiv 2106.09685) beside frozen weights, and frozen parts of a model."""

    lora_dim: int | None = None
    """Rank of LoRA's adapters, of which alone the run trains the weights (peft: r); null: no adapters."""
    lora_alpha: float = 32.0
    """Adapters are scaled by lora_alpha / lora_dim."""
    lora_dropout: float = 0.0
    """Dropout of an adapter's input."""
    lora_target_modules: tuple[LoraTarget, ...] = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    """Layers with adapters: queries, keys and values; attention's output; the MLP's first and second projection."""
    frozen_parameters: tuple[str, ...] = ()
    """Patterns (as of file names) of parameters that are not trained: embedding.*, decoder.layers.[0-3].*; layers
    count from 0 over the whole model."""
