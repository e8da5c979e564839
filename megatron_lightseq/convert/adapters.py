"""Adapters of a checkpoint: merged into the weights beside them, or in the files of the peft library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_lightseq.config import PretrainConfig
from megatron_lightseq.convert.families.family import Place
from megatron_lightseq.convert.forms import ByGroup, Fused, Same, Stacked
from megatron_lightseq.convert.mapping import Mapped
from megatron_lightseq.convert.skeleton import Entry
from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.megatron.adapters import SUFFIX, is_adapter

PEFT_PREFIX = "base_model.model."
"""Of names in adapter_model.safetensors, before those of the model that peft has wrapped."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """The two matrices beside one weight of the model."""

    weight: Mapped
    linear_in: Entry
    """A, (dim, inputs)."""
    linear_out: Entry
    """B, (outputs, dim), its rows in Megatron's order."""


def own_entries(entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
    """The tensors of a model without those of its adapters."""
    return tuple(entry for entry in entries if not is_adapter(entry.name))


def adapters_of(entries: tuple[Entry, ...], mapped: list[Mapped]) -> dict[str, Adapter]:
    """The adapters of a model, by the names of the weights beside them."""
    by_name = {entry.name: entry for entry in entries}
    found = {}
    for one in mapped:
        layer, _, kind = one.entry.name.rpartition(".")
        parts = [by_name.get(f"{layer}{SUFFIX}.{side}.weight") for side in ("linear_in", "linear_out")]
        if kind == "weight" and parts[0] is not None and parts[1] is not None:
            found[one.entry.name] = Adapter(one, parts[0], parts[1])
    return found


def merged(weight: Tensor, linear_in: Tensor, linear_out: Tensor, scale: float) -> Tensor:
    """``W + scale * B A``, computed in fp32 and rounded once to the dtype of ``W``."""
    product = linear_out.float() @ linear_in.float()
    return torch.add(weight.float(), product, alpha=scale).to(weight.dtype)


def peft_tensors(adapter: Adapter, linear_in: Tensor, linear_out: Tensor) -> dict[str, Tensor]:
    """One adapter by peft's names: of projections that Megatron joins, each has its own B and a copy of A.

    Raises:
        UnsupportedError: the weight is stored in a way in which B cannot be.
    """
    form = adapter.weight.rule.form
    if not isinstance(form, Same | ByGroup | Stacked | Fused):
        raise UnsupportedError(
            explain(
                got=f"an adapter for {adapter.weight.places[0].name}",
                rule="peft has adapters for projections that are stored as (outputs, inputs)",
                remedy="Merge the adapters: leave --adapter out",
            )
        )
    found = {}
    for place, part in zip(adapter.weight.places, form.split(linear_out), strict=True):
        module = PEFT_PREFIX + place.name.removesuffix(".weight")
        found[f"{module}.lora_A.weight"] = linear_in
        found[f"{module}.lora_B.weight"] = part.contiguous()
    return found


def peft_config(config: PretrainConfig, places: list[Place], base_model: str | None) -> dict[str, Any]:
    """The content of adapter_config.json.

    Args:
        config: of the run.
        places: every projection that has an adapter.
        base_model: what peft loads the model from, if it is known.
    """
    modules = {place.name.removesuffix(".weight").rpartition(".")[2] for place in places}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.tuning.lora_dim,
        "lora_alpha": config.tuning.lora_alpha,
        "lora_dropout": config.tuning.lora_dropout,
        "target_modules": sorted(modules),
        "bias": "none",
        "inference_mode": True,
    }
