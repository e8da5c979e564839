"""Checks of Megatron's options by the table in config/megatron_options.py: what is refused, and what is replaced.

Used by :class:`~megatron_lightseq.megatron.LightSeqCoreAttention` for the configuration and the arguments with which
Megatron-Core builds and calls it, and by the Megatron-LM launcher for the command line. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

from megatron_lightseq.config.megatron_option import Kind, Option, shown
from megatron_lightseq.config.megatron_options import attention_options
from megatron_lightseq.errors import UnsupportedError, explain

FIELDS = attention_options("field")
"""What attention does with each field of TransformerConfig and MLATransformerConfig."""
ARGUMENTS: Mapping[Kind, Mapping[str, Option]] = {
    "constructor": attention_options("constructor"),
    "forward": attention_options("forward"),
}
"""What attention does with each argument it is built or called with."""

RELATED = re.compile(
    r"attn|attention|softmax|^qk|_qk|qkv|window|rope|rotary|context_parallel|^cp_|head|kv_|query|flash|fp8|fp4|quant"
    r"|kitchen|cuda_graph|offload|recompute|deterministic|batch_invariant|mtp|overlap_moe|^dsa|^linear_|latent|hybrid"
    r"|hete?re?o|inference|seqlen|seq_len|lora_rank|mscale|beta_|autocast|transformer_impl|activation_checkpoint"
    r"|rng_tracker|original_max|capacity_factor"
)
"""Fields whose names match must be in the table, or Megatron's configuration is not understood."""


def refused_fields(config: Any, but: Container[str] = ()) -> Iterator[str]:
    """A message for each field of a configuration that attention refuses.

    Args:
        config: Megatron's, of any version: fields that it lacks ask for nothing.
        but: names to leave out.
    """
    for name, option in FIELDS.items():
        if name not in but and option.attention == "refused" and hasattr(config, name):
            value = getattr(config, name)
            if option.asks(value) and option.applies(config):
                condition = f" {option.condition.text}" if option.condition is not None else ""
                yield refusal(f"{name} = {shown(value)}{condition}", option)


def replaced_fields(config: Any) -> Iterator[str]:
    """``name value`` for each field that only selects a kernel, in place of which ours runs."""
    for name, option in FIELDS.items():
        if option.attention == "replaced" and hasattr(config, name) and option.asks(getattr(config, name)):
            yield f"{name} {getattr(getattr(config, name), 'name', getattr(config, name))}"


def refused_arguments(kind: Kind, values: Mapping[str, Any]) -> Iterator[str]:
    """A message for each argument that attention refuses; unknown ones are refused unless they are None."""
    for name, value in values.items():
        option = ARGUMENTS[kind].get(name, _UNKNOWN)
        if option.attention == "refused" and option.asks(value):
            yield refusal(f"the {kind} argument {name} = {shown(value)}", option)


def refusal(what: str, option: Option) -> str:
    """Why attention refuses an option, and what to do."""
    return explain(
        got=what,
        rule=f"LightSeq attention refuses it, because {option.reason}",
        remedy=option.remedy,
    )


def raise_refusals(problems: Sequence[str]) -> None:
    """Raise :class:`UnsupportedError` with all of them, numbered if there are several; without any, do nothing."""
    if len(problems) == 1:
        raise UnsupportedError(problems[0])
    if problems:
        lines = [f"{number}. {problem}" for number, problem in enumerate(problems, start=1)]
        raise UnsupportedError("\n".join([f"{len(problems)} options are not supported:", *lines]))


_UNKNOWN = Option(names=(), attention="refused", harmless=(None,), reason="it is not known here")
