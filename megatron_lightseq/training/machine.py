"""What a run finds on its machine, for the rules of its configuration."""

from __future__ import annotations

import importlib.util

import torch

from megatron_lightseq.config import Machine
from megatron_lightseq.megatron.transformer_impl import use_transformer_engine


def this_machine(world_size: int) -> Machine:
    """The facts about this process's machine, in a world of ``world_size`` ranks.

    Raises:
        ConfigError: MLS_TRANSFORMER_IMPL names an implementation that does not exist or cannot be imported.
    """
    return Machine(
        world_size=world_size,
        num_gpus=torch.cuda.device_count(),
        has_transformer_engine=use_transformer_engine(),
        has_flash_attn=importlib.util.find_spec("flash_attn") is not None,
    )
