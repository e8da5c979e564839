"""What the launcher does with Megatron-LM's arguments that attention cannot follow: refuse, or replace.

The arguments are those of the table in config/megatron_options.py. Fields of Megatron-Core's configuration that
attention refuses are refused here already, so that one report names everything before a model is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import SimpleNamespace
from typing import Any

from megatron_lightseq.config.megatron_option import Option, as_flag, with_flags
from megatron_lightseq.config.megatron_options import launcher_options
from megatron_lightseq.errors import explain

SIZE_ARGUMENTS = (
    "context_parallel_size",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "micro_batch_size",
    "moe_token_drop_policy",
    "moe_pad_expert_input_to_capacity",
)
"""Other arguments that reasons and remedies mention."""


def refusals(arguments: Any, ours: Mapping[str, Any]) -> list[str]:
    """A message for every argument that would be ignored, with its value, the reason and a remedy.

    Args:
        arguments: Megatron-LM's namespace.
        ours: values of our keys, which Megatron-LM's namespace lacks where ``--spec`` is used.
    """
    both = SimpleNamespace(**{**vars(arguments), **ours})
    return [
        _message(name, getattr(both, name), option, ours)
        for name, option in launcher_options()
        if option.in_launcher == "refused" and _asks(both, name, option) and option.applies(both)
    ]


def replace_kernels(arguments: Any) -> list[str]:
    """Set every argument that only selects an attention kernel to its neutral value, because ours runs instead.

    Returns:
        The arguments as they were given, for the log.
    """
    given: list[str] = []
    for name, option in launcher_options():
        if option.in_launcher == "replaced" and _asks(arguments, name, option):
            value = getattr(arguments, name)
            given.append(_as_given(name, value))
            neutral = option.harmless[0]
            setattr(arguments, name, type(value)[neutral] if isinstance(value, Enum) else neutral)
    return given


def _asks(arguments: Any, name: str, option: Option) -> bool:
    """Whether an argument asks for what the option refuses or replaces; one that this Megatron-LM lacks does not."""
    return hasattr(arguments, name) and option.asks(getattr(arguments, name))


def _message(name: str, value: Any, option: Option, ours: Mapping[str, Any]) -> str:
    condition = f" {option.condition.text}" if option.condition is not None else ""
    text = explain(
        got=f"{_as_given(name, value)}{condition}",
        rule=option.reason,
        remedy=option.remedy,
    )
    return with_flags(text, [*ours, *option.names, *SIZE_ARGUMENTS])


def _as_given(name: str, value: Any) -> str:
    if value is True:
        return as_flag(name)
    words = value if isinstance(value, list | tuple) else [value]
    return " ".join([as_flag(name), *(str(getattr(word, "name", word)) for word in words)])
