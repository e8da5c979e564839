"""From a checkpoint to a Hugging Face folder, one tensor at a time."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_lightseq.config import PretrainConfig
from megatron_lightseq.config.load import from_yaml
from megatron_lightseq.convert.mapping import Mapped, map_entries, wanted_shapes
from megatron_lightseq.convert.recipe import names_of, updated
from megatron_lightseq.convert.safetensors_files import (
    CONFIG_NAME,
    INDEX_NAME,
    SINGLE_NAME,
    SafetensorsWriter,
    read_object,
    safetensors_library,
)
from megatron_lightseq.convert.skeleton import Entry, single_process, skeleton_of
from megatron_lightseq.convert.source import Stored, carry_files
from megatron_lightseq.errors import CheckpointError, ConfigError, explain
from megatron_lightseq.training.checkpoint.companions import COMPANIONS
from megatron_lightseq.training.checkpoint.directory import CheckpointDirectory
from megatron_lightseq.training.checkpoint.manifest import Manifest
from megatron_lightseq.training.checkpoint.sharded_files import PieceReader
from megatron_lightseq.training.checkpoint.weights import RECIPE_NAME

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
    _check_target(folder)
    checkpoint, manifest = _newest(load)
    companions = like or checkpoint.parent / COMPANIONS
    config = _recipe(checkpoint)
    carried = read_object(companions / CONFIG_NAME) if companions.is_dir() else _no_companions(load)
    origin = str(companions / CONFIG_NAME)
    described = updated(carried, config, origin)
    with single_process():
        skeleton = skeleton_of(config, manifest.model["padded_vocab_size"])
    rows = described["vocab_size"]
    mapped = [
        _without_padding(one, rows)
        for one in map_entries(skeleton.entries, names_of(carried, origin).names(config))
    ]
    reader = PieceReader(checkpoint)
    files = _distribute(mapped, reader, max_shard_bytes)
    temporary = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex}")
    try:
        temporary.mkdir()
        _write(temporary, files, mapped, reader)
        carry_files(companions, temporary)
        _write_json(temporary / CONFIG_NAME, described)
        os.rename(temporary, folder)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    tensors = [stored for file in files.values() for stored in file.values()]
    return Exported(folder, checkpoint, len(tensors), sum(map(_num_bytes, tensors)))


# ---- what is exported -----------------------------------------------------------------------------------------


def _newest(load: Path) -> tuple[Path, Manifest]:
    """The newest checkpoint whose files all match its manifest."""
    single = (load / ".metadata").is_file()
    candidates = [load] if single else CheckpointDirectory(root=load).candidates()
    problems: list[str] = []
    for path in candidates:
        try:
            manifest = Manifest.read(path)
            found = manifest.problems(path)
        except CheckpointError as error:
            found = [str(error)]
        if not found:
            return path, manifest
        problems += found
    raise CheckpointError(
        explain(
            got=f"no intact checkpoint in {load}" + (f" ({'; '.join(problems)})" if problems else ""),
            rule="a checkpoint is exported whole",
            remedy="Give the folder that a run or an import has saved to",
        )
    )


def _recipe(checkpoint: Path) -> PretrainConfig:
    path = checkpoint / RECIPE_NAME
    if not path.is_file():
        raise CheckpointError(
            explain(
                got=f"{checkpoint} without {RECIPE_NAME}",
                rule="it says which model the weights are of; older versions did not save it",
                remedy="Load the checkpoint in a run and let it save again",
            )
        )
    return from_yaml(path.read_text(encoding="utf-8"))


def _no_companions(load: Path) -> dict[str, Any]:
    raise ConfigError(
        explain(
            got=f"{load} without the folder {COMPANIONS}",
            rule="config.json and tokenizer come from the model that was imported",
            remedy="Name a folder that has them with --like",
        )
    )


def _without_padding(mapped: Mapped, rows: int) -> Mapped:
    """Rows that pad the vocabulary are left behind."""
    entry = mapped.entry
    if entry.name not in ("embedding.word_embeddings.weight", "output_layer.weight"):
        return mapped
    (piece,) = entry.pieces
    cut = replace(piece, sizes=(rows, *piece.sizes[1:]))
    return replace(mapped, entry=Entry(entry.name, (rows, *entry.shape[1:]), (cut,)))


def _distribute(mapped: list[Mapped], reader: PieceReader, max_bytes: int) -> dict[str, dict[str, Stored]]:
    """The files with their tensors, in the order of the model."""
    dtypes = {
        place.name: reader.entry(one.entry.pieces[0].key).properties.dtype
        for one in mapped
        for place in one.places
    }
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


def _write(
    folder: Path, files: Mapping[str, Mapping[str, Stored]], mapped: list[Mapped], reader: PieceReader
) -> None:
    where = {name: file for file, tensors in files.items() for name in tensors}
    with ExitStack() as stack:
        writers = {file: SafetensorsWriter(folder / file, tensors) for file, tensors in files.items()}
        for writer in writers.values():
            stack.callback(writer.close)
        for one in mapped:
            parts = one.rule.form.split(_read(one.entry, reader))
            for place, part in zip(one.places, parts, strict=True):
                writers[where[place.name]].write(place.name, part, place.expert)
    if len(files) > 1:
        total = sum(_num_bytes(stored) for tensors in files.values() for stored in tensors.values())
        _write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": where})
    for file in files:
        with safetensors_library().safe_open(folder / file, framework="pt"):
            pass  # the library checks the header


def _read(entry: Entry, reader: PieceReader) -> torch.Tensor:
    parts = [reader.read(piece.key, piece.offset, piece.sizes) for piece in entry.pieces]
    return torch.cat([part.reshape(-1, *entry.shape[1:]) for part in parts])


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_target(folder: Path) -> None:
    if folder.exists() or not folder.resolve().parent.is_dir():
        raise ConfigError(
            explain(
                got=f"{folder}, which exists"
                if folder.exists()
                else f"{folder}, whose parent does not exist",
                rule="an export is a new folder",
                remedy="Choose a new folder in one that exists",
            )
        )


def _cannot_write(folder: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        explain(
            got=f"writing {folder}: {error.strerror or error}",
            rule="the model is written to that folder",
            remedy="Check free space and permissions; nothing half-written is left",
        )
    )
