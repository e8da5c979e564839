"""From our options and Megatron-LM's arguments to what attention layers are built with.

The arguments that this package's configuration has as well are read into one: its rules on context parallelism hold
here too, and ``auto`` chooses by the same simulation.
"""

from __future__ import annotations

from typing import Any

from megatron_lightseq.attention import AttentionStats
from megatron_lightseq.config import PretrainConfig, with_values
from megatron_lightseq.config.resolved import resolve_attention
from megatron_lightseq.config.validate import CONTEXT_RULES, violations
from megatron_lightseq.megatron.core_attention import CoreAttentionSettings
from megatron_lightseq.megatron.lm.options import LmOptions

SHARED = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "kv_channels",
    "tensor_model_parallel_size",
    "context_parallel_size",
    "seq_length",
    "micro_batch_size",
    "bf16",
)
"""Arguments of Megatron-LM that are keys of ours and matter to context parallelism."""


def violated_rules(options: LmOptions, arguments: Any) -> list[str]:
    """A message for each rule that our options break, together or with the model and its parallel sizes."""
    return violations(as_config(options, arguments), rule_sets=CONTEXT_RULES)


def core_attention_settings(
    options: LmOptions, arguments: Any, stats: AttentionStats
) -> CoreAttentionSettings:
    """What layers are built with: our options, and the types that Megatron-LM's ``--cp-comm-type`` names.

    Args:
        options: ours; they break no rule (:func:`violated_rules`).
        arguments: Megatron-LM's namespace.
        stats: counters that all layers share.
    """
    config = as_config(options, arguments)
    context, resolved = config.context, resolve_attention(config)
    inner = getattr(arguments, "hierarchical_context_parallel_sizes", None)
    return CoreAttentionSettings(
        method=context.method_name,
        comm_types=context.cp_comm_type,
        ulysses_size=context.cp_ulysses_size or (inner[0] if inner else None),
        layout=context.layout_name if resolved is None else resolved.layout.name,
        kernel=context.cp_kernel,
        overlap=context.cp_overlap,
        invariant_chunk=context.cp_invariant,
        verify_transport=context.cp_verify_transport,
        network=context.network,
        resolved=resolved,
        keep_on_recompute=options.keep_attention_on_recompute,
        stats=stats,
    )


def as_config(options: LmOptions, arguments: Any) -> PretrainConfig:
    """A run of Megatron-LM as this package's configuration: :data:`SHARED` and our options; the rest has defaults."""
    values = {name: getattr(arguments, name, None) for name in SHARED}
    comm_types = tuple(getattr(arguments, "cp_comm_type", None) or ())
    if comm_types != ("p2p",):  # Megatron-LM's default: the user chose nothing
        values["cp_comm_type"] = comm_types
    if getattr(arguments, "group_query_attention", False):
        values["num_query_groups"] = arguments.num_query_groups
    window = getattr(arguments, "window_size", None)
    if window and min(window) >= 0:  # for `auto`; attention reads Megatron's configuration
        values["window_size"] = tuple(window)
    known = {name: value for name, value in values.items() if value is not None}
    return with_values(PretrainConfig(), **known, **options.values)
