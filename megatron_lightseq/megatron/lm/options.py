"""Our options in Megatron-LM: flags next to its own, or environment variables where ``--spec`` is used.

Both name keys of :mod:`megatron_lightseq.config.sections`: ``--cp-method ring``, or ``MLS_CP_METHOD=ring``, or
``cp_method: ring`` in the YAML file that ``MLS_CONFIG`` names. Variables override the file.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from megatron_lightseq.config import ContextParallelConfig, PretrainConfig, to_flat
from megatron_lightseq.config.load import from_entries
from megatron_lightseq.config.sections import RecomputeConfig
from megatron_lightseq.config.strict_yaml import Entry, read_yaml
from megatron_lightseq.config.typed import choices, describe, field_docstrings, is_switch
from megatron_lightseq.errors import ConfigError, explain

RECOMPUTE_KEYS = ("keep_attention_on_recompute", "mlp_tile_tokens", "loss_tile_tokens")
KEYS = (
    *(entry.name for entry in fields(ContextParallelConfig) if entry.name != "cp_comm_type"),
    *RECOMPUTE_KEYS,
)
"""The keys that are ours; all others, including ``cp_comm_type``, are Megatron-LM's own arguments."""
PREFIX = "MLS_"
FILE_VARIABLE = "MLS_CONFIG"


@dataclass(frozen=True, kw_only=True, slots=True)
class LmOptions:
    """Our options of one Megatron-LM run."""

    context: ContextParallelConfig = field(default_factory=ContextParallelConfig)
    """Method, layout, kernel, overlap."""
    keep_attention_on_recompute: bool = True
    """Keep attention results across activation recomputation."""
    mlp_tile_tokens: int | None = None
    """Tokens per slice of dense MLPs; None: not sliced."""
    loss_tile_tokens: int | None = None
    """Tokens per slice of logits and losses; None: not sliced."""

    @property
    def active(self) -> bool:
        """Whether attention is ours; ``cp_method megatron`` leaves Megatron-LM as it is, for a baseline."""
        return self.context.cp_method != "megatron"

    @property
    def slices(self) -> tuple[int | None, int | None]:
        """Tokens per slice of MLPs, and of logits and losses."""
        return self.mlp_tile_tokens, self.loss_tile_tokens

    @property
    def values(self) -> dict[str, Any]:
        """Value by key."""
        return {key: getattr(self if key in RECOMPUTE_KEYS else self.context, key) for key in KEYS}


def add_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add our flags to Megatron-LM's parser, as a separate group."""
    defaults = to_flat(PretrainConfig())
    texts = {**field_docstrings(ContextParallelConfig), **field_docstrings(RecomputeConfig)}
    group = parser.add_argument_group(
        title="LightSeq", description="context parallelism by megatron_lightseq"
    )
    for key in KEYS:
        flag, text = f"--{key.replace('_', '-')}", texts[key].replace("%", "%%")
        if is_switch(key):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=defaults[key], help=text)
        else:
            group.add_argument(
                flag,
                type=int if "integer" in describe(key) else str,
                choices=choices(key) or None,
                default=defaults[key],
                help=text,
            )
    return parser


def options_from_flags(arguments: argparse.Namespace) -> LmOptions:
    """Our options, from the namespace of Megatron-LM's parser.

    Raises:
        ConfigError: the namespace lacks them, because ``--yaml-cfg`` has replaced it.
    """
    missing = [key for key in KEYS if not hasattr(arguments, key)]
    if missing:
        raise ConfigError(
            explain(
                got="--yaml-cfg, whose file replaces the command line",
                rule=f"{', '.join(missing)} can only be read from the command line",
                remedy="Give Megatron-LM's arguments as flags",
            )
        )
    return _options({key: getattr(arguments, key) for key in KEYS})


def options_from_environment(environment: Mapping[str, str] | None = None) -> LmOptions:
    """Our options, from ``MLS_CONFIG`` and ``MLS_<KEY>``.

    Args:
        environment: variables; default: those of this process.

    Raises:
        ConfigError: the file cannot be read, a value has the wrong type, or a key is Megatron-LM's.
    """
    variables = os.environ if environment is None else environment
    layers: list[Mapping[str, Entry]] = []
    if variables.get(FILE_VARIABLE):
        layers.append(read_yaml(Path(variables[FILE_VARIABLE])))
        for key, entry in layers[0].items():
            if key not in KEYS:
                raise ConfigError(
                    explain(
                        got=f"{key!r} ({entry.origin})",
                        rule=f"{FILE_VARIABLE} may hold the keys {', '.join(KEYS)}",
                        remedy="Give other options to Megatron-LM as flags",
                    )
                )
    names = {key: f"{PREFIX}{key.upper()}" for key in KEYS}
    layers.append(
        {
            key: Entry(variables[name], f"environment variable {name}")
            for key, name in names.items()
            if name in variables
        }
    )
    flat = to_flat(from_entries(layers))
    return _options({key: flat[key] for key in KEYS})


def _options(values: Mapping[str, Any]) -> LmOptions:
    of_context = {key: value for key, value in values.items() if key not in RECOMPUTE_KEYS}
    of_recompute = {key: values[key] for key in RECOMPUTE_KEYS}
    return LmOptions(context=replace(ContextParallelConfig(), **of_context), **of_recompute)
