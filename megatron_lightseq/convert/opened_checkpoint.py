"""A checkpoint that is about to be exported: its recipe, its tensors, and how they are named in the other format."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_lightseq.config import PretrainConfig
from megatron_lightseq.config.load import from_yaml
from megatron_lightseq.convert.adapters import Adapter, adapters_of, merged, own_entries
from megatron_lightseq.convert.mapping import Mapped, map_entries
from megatron_lightseq.convert.recipe import names_of, updated
from megatron_lightseq.convert.safetensors_files import CONFIG_NAME, read_object
from megatron_lightseq.convert.skeleton import Entry, single_process, skeleton_of
from megatron_lightseq.errors import CheckpointError, ConfigError, explain
from megatron_lightseq.training.checkpoint.companions import COMPANIONS
from megatron_lightseq.training.checkpoint.directory import CheckpointDirectory
from megatron_lightseq.training.checkpoint.manifest import Manifest
from megatron_lightseq.training.checkpoint.sharded_files import PieceReader
from megatron_lightseq.training.checkpoint.weights import RECIPE_NAME


@dataclass(frozen=True, slots=True)
class OpenedCheckpoint:
    """What :func:`open_checkpoint` returns."""

    path: Path
    config: PretrainConfig
    """Of the run that has saved it."""
    companions: Path
    """The folder with config.json and tokenizer."""
    described: Mapping[str, Any]
    """config.json, with what the run has changed."""
    mapped: list[Mapped]
    """Every tensor of the model, without rows that pad the vocabulary."""
    adapters: Mapping[str, Adapter]
    """By Megatron's names of the weights beside them."""
    reader: PieceReader

    def dtype(self, entry: Entry) -> torch.dtype:
        """Of a tensor in the checkpoint."""
        found = self.reader.entry(entry.pieces[0].key).properties.dtype
        assert isinstance(found, torch.dtype)
        return found

    def read(self, entry: Entry) -> torch.Tensor:
        """One whole tensor, as it is stored."""
        parts = [self.reader.read(piece.key, piece.offset, piece.sizes) for piece in entry.pieces]
        return torch.cat([part.reshape(-1, *entry.shape[1:]) for part in parts])

    def read_merged(self, entry: Entry) -> torch.Tensor:
        """One whole tensor of the model, with its adapter if it has one."""
        weight, adapter = self.read(entry), self.adapters.get(entry.name)
        if adapter is None:
            return weight
        tuning = self.config.tuning
        assert tuning.lora_dim is not None, "the model has adapters"
        matrices = self.read(adapter.linear_in), self.read(adapter.linear_out)
        return merged(weight, *matrices, tuning.lora_alpha / tuning.lora_dim)


def open_checkpoint(load: Path, like: Path | None) -> OpenedCheckpoint:
    """Find and describe the newest checkpoint of a folder.

    Args:
        load: a folder of checkpoints, or one checkpoint.
        like: a folder with the config.json and the tokenizer of the model; default: those that were imported with it.

    Raises:
        ConfigError: there is no config.json.
        UnsupportedError: the run has changed what config.json cannot say.
        CheckpointError: there is no intact checkpoint, or it does not say what it is of.
    """
    path, manifest = _newest(load)
    companions = like or path.parent / COMPANIONS
    config = _recipe(path)
    carried = read_object(companions / CONFIG_NAME) if companions.is_dir() else _no_companions(load)
    origin = str(companions / CONFIG_NAME)
    described = updated(carried, config, origin)
    with single_process():
        entries = skeleton_of(config, manifest.model["padded_vocab_size"]).entries
    mapped = map_entries(own_entries(entries), names_of(carried, origin).names(config))
    return OpenedCheckpoint(
        path=path,
        config=config,
        companions=companions,
        described=described,
        mapped=[_without_padding(one, described["vocab_size"]) for one in mapped],
        adapters=adapters_of(entries, mapped),
        reader=PieceReader(path),
    )


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder that gets its name when everything in it is written.

    Raises:
        ConfigError: it exists already, or its parent does not.
        CheckpointError: it cannot be written; nothing half-written is left.
    """
    check_target(folder)
    temporary = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex}")
    try:
        temporary.mkdir()
        yield temporary
        os.rename(temporary, folder)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_target(folder: Path) -> None:
    """Raise ConfigError unless a folder can be made."""
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


def _cannot_write(folder: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        explain(
            got=f"writing {folder}: {error.strerror or error}",
            rule="the model is written to that folder",
            remedy="Check free space and permissions; nothing half-written is left",
        )
    )
