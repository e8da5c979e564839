"""Which of a model's parameters a run trains."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist

from megatron_lightseq.config import PretrainConfig
from megatron_lightseq.errors import ConfigError, explain
from megatron_lightseq.megatron.adapters import LoraSettings, add_adapters, keep_graph

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


def lora_settings(config: PretrainConfig) -> LoraSettings | None:
    """The adapters of a configuration; None if it has none."""
    tuning = config.tuning
    if tuning.lora_dim is None:
        return None
    return LoraSettings(
        dim=tuning.lora_dim,
        alpha=tuning.lora_alpha,
        dropout=tuning.lora_dropout,
        targets=tuning.lora_target_modules,
        seed=config.training.seed,
    )


def choose_trained(config: PretrainConfig, model: Any) -> None:
    """Add adapters to a built GPTModel, or freeze what the configuration names."""
    lora, patterns = lora_settings(config), config.tuning.frozen_parameters
    if lora is not None:
        add_adapters(model, lora)
    elif patterns:
        for name, parameter in global_names(model):
            if _matches(name, patterns):
                parameter.requires_grad_(False)
        keep_graph(model)


def check_trained(config: PretrainConfig, models: Sequence[Any], device: torch.device) -> None:
    """Every pattern matches a parameter, and every rank trains one. Collective, if parameters are frozen.

    Raises:
        ConfigError: on every rank, if that is not so.
    """
    patterns = config.tuning.frozen_parameters
    if not patterns:
        return
    named = [pair for model in models for pair in global_names(model)]
    found = [any(_matches(name, (pattern,)) for name, _ in named) for pattern in patterns]
    matched = torch.tensor(found, dtype=torch.int32, device=device)
    dist.all_reduce(matched, op=dist.ReduceOp.MAX)
    trains = torch.tensor(int(any(p.requires_grad for _, p in named)), dtype=torch.int32, device=device)
    dist.all_reduce(trains, op=dist.ReduceOp.MIN)
    unused = [pattern for pattern, hit in zip(patterns, matched.tolist(), strict=True) if not hit]
    if unused:
        raise ConfigError(
            explain(
                got=f"frozen_parameters with {', '.join(unused)}",
                rule="every pattern matches the name of a parameter, such as "
                + ", ".join(name for name, _ in named[:3]),
                remedy="Correct or remove the pattern",
            )
        )
    if not int(trains):
        raise ConfigError(
            explain(
                got=f"frozen_parameters: {', '.join(patterns)}",
                rule="every pipeline stage trains at least one parameter",
                remedy="Freeze less, or use fewer pipeline stages",
            )
        )


def global_names(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """A chunk's parameters by their names in the whole model, whose layers are counted from 0.

    An output layer that shares the embedding's weight has the embedding's name, on the last pipeline stage, too.
    """
    numbers = [layer.layer_number - 1 for layer in model.decoder.layers]
    for name, parameter in model.named_parameters():
        if name == _OUTPUT and model.share_embeddings_and_output_weights:
            name = _EMBEDDING
        yield _LAYER.sub(lambda found: f"decoder.layers.{numbers[int(found[1])]}.", name), parameter


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
