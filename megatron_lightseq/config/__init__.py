"""The frozen configuration of a run, read from YAML files and command-line flags.

Importing this package needs PyYAML and the standard library; jsonargparse is imported when a file or a command
line is first read.
"""

from __future__ import annotations

from megatron_lightseq.config.flat import from_flat, keys, to_flat, with_values
from megatron_lightseq.config.load import from_yaml, load_config, parse_config, to_yaml
from megatron_lightseq.config.resolved import ResolvedAttention, ResolvedConfig, resolve
from megatron_lightseq.config.rules import Machine
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
from megatron_lightseq.config.validate import rules, validate, violations

__all__ = [
    "CheckpointConfig",
    "ContextParallelConfig",
    "DataConfig",
    "LoggingConfig",
    "Machine",
    "ModelConfig",
    "OptimizerSettings",
    "ParallelConfig",
    "PretrainConfig",
    "RecomputeConfig",
    "ResolvedAttention",
    "ResolvedConfig",
    "TrainingConfig",
    "from_flat",
    "from_yaml",
    "keys",
    "load_config",
    "parse_config",
    "resolve",
    "rules",
    "to_flat",
    "to_yaml",
    "validate",
    "violations",
    "with_values",
]
