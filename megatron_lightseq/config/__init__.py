"""Frozen configuration: YAML files and command-line flags both end here.

Importing this package needs the standard library only; reading files needs jsonargparse, which
:func:`load_config` imports when it is called.
"""

from __future__ import annotations

from megatron_lightseq.config.flat import from_flat, keys, to_flat, with_values
from megatron_lightseq.config.sections import (
    CheckpointConfig,
    ContextParallelConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerSettings,
    ParallelConfig,
    PretrainConfig,
    RecomputeConfig,
    TrainingConfig,
)

__all__ = [
    "CheckpointConfig",
    "ContextParallelConfig",
    "DataConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerSettings",
    "ParallelConfig",
    "PretrainConfig",
    "RecomputeConfig",
    "TrainingConfig",
    "from_flat",
    "keys",
    "to_flat",
    "with_values",
]
