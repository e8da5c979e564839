"""`lightseq pretrain [CONFIG.yaml ...] [--key value ...]`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

from megatron_lightseq.config.flags import read_flags
from megatron_lightseq.config.load import load_config, parse_config, to_yaml
from megatron_lightseq.config.rules import Machine
from megatron_lightseq.config.typed import parser
from megatron_lightseq.training.job.launch import Launch


def run(arguments: Sequence[str]) -> int:
    """Train, or print the help or the configuration. Files and rules are checked before torch is imported."""
    actions = read_flags(arguments).actions
    if "help" in actions:
        sys.stdout.write(parser().format_help())
        return 0
    if "print_config" in actions:
        sys.stdout.write(to_yaml(parse_config(arguments)))
        return 0
    world_size = Launch.from_environment().world_size
    load_config(arguments, machine=Machine(world_size=world_size))

    import torch

    from megatron_lightseq.training.pretrain import pretrain

    machine = Machine(
        world_size=world_size,
        num_gpus=torch.cuda.device_count(),
        has_transformer_engine=importlib.util.find_spec("transformer_engine") is not None,
        has_flash_attn=importlib.util.find_spec("flash_attn") is not None,
    )
    return pretrain(load_config(arguments, machine=machine))
