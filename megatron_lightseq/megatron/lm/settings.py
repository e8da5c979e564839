"""From our options and Megatron-LM's arguments to what attention layers are built with.

The arguments are read into this package's own configuration, as far as it knows them: its rules on context
parallelism hold here too, and ``auto`` chooses by the same prediction.
"""

from __future__ import annotations

from typing import Any

from megatron_lightseq.attention import AttentionStats
from megatron_lightseq.config import PretrainConfig, with_values
from megatron_lightseq.config.resolved import resolve_attention
from megatron_lightseq.config.validate import CONTEXT_RULES, validate
from megatron_lightseq.megatron.core_attention import CoreAttentionSettings
from megatron_lightseq.megatron.lm.options import KEYS, RECOMPUTE_KEYS, LmOptions

SHARED = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "kv_channels",
    "attention_dropout",
    "tensor_model_parallel_size",
    "context_parallel_size",
    "seq_length",
    "micro_batch_size",
    "bf16",
)
"""Arguments of Megatron-LM that are keys of ours, and matter to context parallelism."""


def core_attention_settings(
    options: LmOptions, arguments: Any, stats: AttentionStats
) -> CoreAttentionSettings:
    """What layers are built with: our options, and the kinds that Megatron-LM's ``--cp-comm-type`` names.

    Args:
        options: ours.
        arguments: Megatron-LM's namespace.
        stats: where all layers count.

    Raises:
        ConfigError: options that do not fit together, or to the model and its parallel sizes.
    """
    config = as_config(options, arguments)
    validate(config, rule_sets=CONTEXT_RULES)
    context, resolved = config.context, resolve_attention(config)
    inner = getattr(arguments, "hierarchical_context_parallel_sizes", None)
    return CoreAttentionSettings(
        method=context.method_name,
        comm_types=context.cp_comm_type,
        ulysses_size=context.cp_ulysses_size or (inner[0] if inner else None),
        layout=context.layout_name if resolved is None else resolved.layout.name,
        kernel=context.cp_kernel,
        overlap=context.cp_overlap,
        network=context.network,
        resolved=resolved,
        keep_on_recompute=options.keep_attention_on_recompute,
        stats=stats,
    )


def as_config(options: LmOptions, arguments: Any) -> PretrainConfig:
    """A run of Megatron-LM in our words, as far as :data:`SHARED` goes; what it leaves open keeps our defaults."""
    values = {name: getattr(arguments, name, None) for name in SHARED}
    comm_types = tuple(getattr(arguments, "cp_comm_type", None) or ())
    if comm_types != ("p2p",):  # Megatron-LM's default, which says nothing
        values["cp_comm_type"] = comm_types
    if getattr(arguments, "group_query_attention", False):
        values["num_query_groups"] = arguments.num_query_groups
    window = getattr(arguments, "window_size", None)
    if window and min(window) >= 0:  # what `auto` weighs; attention itself reads Megatron's configuration
        values["window_size"] = tuple(window)
    known = {name: value for name, value in values.items() if value is not None}
    ours = {key: getattr(options if key in RECOMPUTE_KEYS else options.context, key) for key in KEYS}
    return with_values(PretrainConfig(), **known, **ours)
