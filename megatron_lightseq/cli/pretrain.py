"""`lightseq pretrain [CONFIG.yaml ...] [--key value ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_lightseq.config import Machine, PretrainConfig, load_config, parse_config, to_yaml, violations
from megatron_lightseq.config.choices import AUTO
from megatron_lightseq.config.flags import read_flags
from megatron_lightseq.config.resolved import resolve_attention
from megatron_lightseq.config.typed import parser
from megatron_lightseq.config.validate import TRAINING_RULES
from megatron_lightseq.training.job.launch import Launch


def run(arguments: Sequence[str]) -> int:
    """Train, or print the help or the configuration. Files and rules are checked before torch is imported."""
    actions = read_flags(arguments).actions
    if "help" in actions:
        sys.stdout.write(parser().format_help())
        return 0
    if "print_config" in actions:
        sys.stdout.write(printed(parse_config(arguments)))
        return 0
    machine = Machine(world_size=Launch.from_environment().world_size)
    config = load_config(arguments, machine=machine)

    from megatron_lightseq.training.pretrain import pretrain

    return pretrain(config, checked=machine)


def printed(config: PretrainConfig) -> str:
    """The configuration as YAML; with `cp_method: auto`, a comment says what that stands for."""
    text = to_yaml(config)
    if config.context.cp_method != AUTO or violations(config, rule_sets=TRAINING_RULES):
        return text
    attention = resolve_attention(config)
    assert attention is not None, "auto is resolved to methods of this package"
    chosen = ", ".join(dict.fromkeys(kind.schedules.name for kind in attention.kinds))
    return f"{text}# cp_method auto: {chosen} on the {attention.layout.name} layout\n"
