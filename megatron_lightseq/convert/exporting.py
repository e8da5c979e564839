"""From a checkpoint to a Hugging Face folder, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_lightseq.convert.adapters import peft_config, peft_tensors
from megatron_lightseq.convert.mapping import wanted_shapes
from megatron_lightseq.convert.opened_checkpoint import (
    OpenedCheckpoint,
    check_target,
    new_folder,
    open_checkpoint,
)
from megatron_lightseq.convert.safetensors_files import (
    CONFIG_NAME,
    INDEX_NAME,
    SINGLE_NAME,
    SafetensorsWriter,
    read_object,
    safetensors_library,
)
from megatron_lightseq.convert.source import Stored, carry_files
from megatron_lightseq.errors import ConfigError, UnsupportedError, explain

ADAPTER_NAME = "adapter_model.safetensors"
MAX_SHARD_BYTES = 5_000_000_000
"""Size that a safetensors file does not exceed, unless one tensor does."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What :func:`export_hf` has written."""

    folder: Path
    checkpoint: Path
    num_tensors: int
    num_bytes: int


def export_hf(
    load: Path, folder: Path, *, like: Path | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Exported:
    """Turn the newest checkpoint of a folder into a model that transformers loads.

    Args:
        load: a folder of checkpoints, or one checkpoint.
        folder: to write; it must not exist.
        like: a folder with the config.json and the tokenizer of the model; default: those that were imported with it.
        max_shard_bytes: size of a safetensors file.

    Raises:
        ConfigError: an argument breaks a rule, or several ranks run.
        UnsupportedError: the run has changed what config.json cannot say.
        CheckpointError: there is no intact checkpoint; nothing half-written is left.
    """
    check_target(folder)
    opened = open_checkpoint(load, like)
    files = _distribute(opened, max_shard_bytes)
    with new_folder(folder) as temporary:
        _write(temporary, files, opened)
        carry_files(opened.companions, temporary)
        _write_json(temporary / CONFIG_NAME, opened.described)
    tensors = [stored for file in files.values() for stored in file.values()]
    return Exported(folder, opened.path, len(tensors), sum(map(_num_bytes, tensors)))


def export_adapter(load: Path, folder: Path, *, like: Path | None = None) -> Exported:
    """Turn the adapters of the newest checkpoint of a folder into a folder that the peft library loads.

    Args:
        load: a folder of checkpoints, or one checkpoint.
        folder: to write; it must not exist.
        like: as in :func:`export_hf`.

    Raises:
        ConfigError: the checkpoint has no adapters, an argument breaks a rule, or several ranks run.
        UnsupportedError: the run has changed something else, or peft has no such adapters.
        CheckpointError: there is no intact checkpoint; nothing half-written is left.
    """
    check_target(folder)
    opened = open_checkpoint(load, like)
    if not opened.adapters:
        raise ConfigError(
            explain(
                got=f"--adapter for {opened.path}, which has no adapters",
                rule="adapters are trained with lora_dim",
                remedy="Leave --adapter out, to export the whole model",
            )
        )
    _check_base_unchanged(opened)
    tensors: dict[str, torch.Tensor] = {}
    for adapter in opened.adapters.values():
        tensors |= peft_tensors(adapter, opened.read(adapter.linear_in), opened.read(adapter.linear_out))
    places = [place for adapter in opened.adapters.values() for place in adapter.weight.places]
    with new_folder(folder) as temporary:
        _write_adapter(temporary / ADAPTER_NAME, tensors)
        settings = peft_config(opened.config, places, opened.described.get("_name_or_path"))
        _write_json(temporary / "adapter_config.json", settings)
        carry_files(opened.companions, temporary, leave_out=(CONFIG_NAME,))
    return Exported(folder, opened.path, len(tensors), sum(x.nbytes for x in tensors.values()))


# ---- what is exported -----------------------------------------------------------------------------------------


def _check_base_unchanged(opened: OpenedCheckpoint) -> None:
    """Adapters alone cannot say that the model under them has another RoPE."""
    carried = read_object(opened.companions / CONFIG_NAME)
    keys = ("rope_theta", "rope_scaling", "rope_parameters")
    changed = [key for key in keys if carried.get(key) != opened.described.get(key)]
    if changed:
        raise UnsupportedError(
            explain(
                got=f"--adapter of a run that has changed {', '.join(changed)} of config.json",
                rule="peft adds adapters to the model as it was imported",
                remedy="Merge the adapters: leave --adapter out",
            )
        )


def _distribute(opened: OpenedCheckpoint, max_bytes: int) -> dict[str, dict[str, Stored]]:
    """The files with their tensors, in the order of the model."""
    mapped = opened.mapped
    dtypes = {place.name: opened.dtype(one.entry) for one in mapped for place in one.places}
    shards: list[dict[str, Stored]] = [{}]
    used = 0
    for name, shape in wanted_shapes(mapped).items():
        stored = Stored(shape, dtypes[name], "")
        if used and used + _num_bytes(stored) > max_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = stored
        used += _num_bytes(stored)
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard
        for number, shard in enumerate(shards, 1)
    }


def _num_bytes(stored: Stored) -> int:
    assert isinstance(stored.dtype, torch.dtype)
    return stored.dtype.itemsize * torch.Size(stored.shape).numel()


# ---- writing --------------------------------------------------------------------------------------------------


def _write_adapter(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    stored = {name: Stored(tuple(x.shape), x.dtype, path.name) for name, x in tensors.items()}
    writer = SafetensorsWriter(path, stored)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.close()


def _write(folder: Path, files: Mapping[str, Mapping[str, Stored]], opened: OpenedCheckpoint) -> None:
    where = {name: file for file, tensors in files.items() for name in tensors}
    with ExitStack() as stack:
        writers = {file: SafetensorsWriter(folder / file, tensors) for file, tensors in files.items()}
        for writer in writers.values():
            stack.callback(writer.close)
        for one in opened.mapped:
            parts = one.rule.form.split(opened.read_merged(one.entry))
            for place, part in zip(one.places, parts, strict=True):
                writers[where[place.name]].write(place.name, part, place.expert)
    if len(files) > 1:
        total = sum(_num_bytes(stored) for tensors in files.values() for stored in tensors.values())
        _write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": where})
    for file in files:
        with safetensors_library().safe_open(folder / file, framework="pt"):
            pass  # the library checks the header


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
