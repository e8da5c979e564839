"""From a source to a checkpoint: checked first, then written one tensor at a time."""

from __future__ import annotations

import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_lightseq.config import PretrainConfig, with_values
from megatron_lightseq.convert.gguf_files import GgufFile
from megatron_lightseq.convert.mapping import TIED_OUTPUT, Mapped, check_source, map_entries
from megatron_lightseq.convert.recipe import names_of, recipe_of, recipe_text
from megatron_lightseq.convert.safetensors_files import HuggingFaceFolder
from megatron_lightseq.convert.skeleton import Skeleton, single_process, skeleton_of
from megatron_lightseq.convert.source import Source
from megatron_lightseq.errors import CheckpointError, ConfigError, explain
from megatron_lightseq.training.checkpoint.companions import COMPANIONS
from megatron_lightseq.training.checkpoint.directory import CheckpointDirectory, checkpoint_name
from megatron_lightseq.training.checkpoint.weights import save_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Imported:
    """What :func:`import_hf` has written."""

    checkpoint: Path
    recipe: PretrainConfig
    num_tensors: int
    num_parameters: int


def import_hf(
    source: Path | Source,
    *,
    save: Path,
    recipe: Path,
    dtype: str | None = None,
    ignored_fields: tuple[str, ...] = (),
) -> Imported:
    """Turn a Hugging Face model into a checkpoint and a recipe.

    Args:
        source: a folder as ``save_pretrained`` writes it, a GGUF file, or an opened source.
        save: folder of checkpoints to write; it must not hold any.
        recipe: YAML file to write; it loads the checkpoint.
        dtype: ``float32`` or ``bfloat16``, to convert to; default: as the files are.
        ignored_fields: fields of config.json to treat as without effect.

    Raises:
        ConfigError: config.json or an argument breaks a rule, or several ranks run.
        UnsupportedError: a family, field or dtype that cannot be converted.
        CheckpointError: a file is missing, damaged or of another model; nothing half-written is left.
    """
    opened = _opened(source) if isinstance(source, Path) else source
    _check_targets(save, recipe)
    config = recipe_of(opened.config, opened.origin, ignored_fields)
    vocab_size = config.data.vocab_size
    assert vocab_size is not None, "every family reads it"
    config = _with_tokenizer(config, opened, save, vocab_size)
    with single_process():
        skeleton = skeleton_of(config, vocab_size)
        family = names_of(opened.config, opened.origin)
        mapped = map_entries(skeleton.entries, family.names(config))
        left_out = family.left_out and family.left_out.format(layers=config.model.num_layers)
        wanted = check_source(mapped, opened.tensors, None if dtype is None else DTYPES[dtype], left_out)
        _check_tied(opened, mapped)
        config = with_values(config, bf16=wanted is torch.bfloat16)
        skeleton = skeleton_of(config, vocab_size)  # with the dtype that is now known
        return _write(opened, skeleton, mapped, config, save, recipe, wanted)


def _opened(path: Path) -> Source:
    return GgufFile(path) if path.is_file() or path.suffix == ".gguf" else HuggingFaceFolder(path)


def _write(
    source: Source,
    skeleton: Skeleton,
    mapped: list[Mapped],
    config: PretrainConfig,
    save: Path,
    recipe: Path,
    dtype: torch.dtype,
) -> Imported:
    """The companions first, then the checkpoint, whose rename makes the import visible, then the recipe."""
    made = not save.exists()
    vocab_size = config.data.vocab_size or 0
    try:
        _carry(source, save)
        supply = _Supply(source, mapped, dtype)
        folder = save_weights(save, config, vocab_size, skeleton.state, supply)
        _write_atomically(recipe, recipe_text(config, _comment(source)))
    except BaseException:
        shutil.rmtree(save / COMPANIONS, ignore_errors=True)
        if made:
            shutil.rmtree(save, ignore_errors=True)
        raise
    parameters = sum(torch.Size(one.entry.shape).numel() for one in mapped)
    return Imported(folder, config, sum(len(one.places) for one in mapped), parameters)


class _Supply:
    """Makes pieces of the checkpoint; the tensor of the last one is kept, as its other piece comes next."""

    def __init__(self, source: Source, mapped: list[Mapped], dtype: torch.dtype) -> None:
        self._source = source
        self._dtype = dtype
        self._last: tuple[Mapped, list[torch.Tensor]] | None = None
        self._pieces = {
            (piece.key, piece.offset): (one, number)
            for one in mapped
            for number, piece in enumerate(one.entry.pieces)
        }

    def __call__(self, key: str, offset: tuple[int, ...]) -> torch.Tensor:
        one, number = self._pieces[key, offset]
        if self._last is None or self._last[0] is not one:
            self._last = None
            parts = [self._source.read(place.name, place.expert) for place in one.places]
            whole = one.rule.form.join(parts).to(torch.float32 if one.rule.float32 else self._dtype)
            self._last = (one, list(whole.split(one.entry.rows)))
        return self._last[1][number].contiguous()


def _check_targets(save: Path, recipe: Path) -> None:
    present = CheckpointDirectory(root=save).candidates()
    if present or (save / COMPANIONS).exists():
        raise ConfigError(
            explain(
                got=f"--save {save}, which holds {present[0].name if present else COMPANIONS}",
                rule=f"an import is {checkpoint_name(0)} of a new folder",
                remedy="Choose a new folder, or remove that one",
            )
        )
    if not recipe.resolve().parent.is_dir():
        raise ConfigError(
            explain(
                got=f"--recipe {recipe}",
                rule="its folder must exist",
                remedy=f"mkdir -p {recipe.parent}",
            )
        )


def _with_tokenizer(config: PretrainConfig, source: Source, save: Path, vocab_size: int) -> PretrainConfig:
    """The recipe with the checkpoint and its tokenizer; refuses a tokenizer whose ids the embedding lacks."""
    values = {"load": str(save), "finetune": True}
    size = source.tokenizer_size()
    if size is None:
        return with_values(config, tokenizer_type="null", **values)
    if size > vocab_size:
        raise CheckpointError(
            explain(
                got=f"tokenizer.json with ids up to {size - 1}, and vocab_size {vocab_size} in {source.origin}",
                rule="every token needs a row of the embedding",
                remedy="Use the tokenizer of this model, or resize its embedding with transformers first",
            )
        )
    path = save / COMPANIONS / "tokenizer.json"
    return with_values(config, tokenizer_type="hf", tokenizer_model=str(path), **values)


def _check_tied(source: Source, mapped: list[Mapped]) -> None:
    """A file may hold an output layer for a model that shares its embedding, if it is the same."""
    places = {place.name for one in mapped for place in one.places}
    if TIED_OUTPUT in places or TIED_OUTPUT not in source.tensors:
        return
    embedding = next(one.places[0].name for one in mapped if one.entry.name.startswith("embedding."))
    if not torch.equal(source.read(TIED_OUTPUT), source.read(embedding)):
        raise CheckpointError(
            explain(
                got=f"{TIED_OUTPUT} that differs from {embedding}, with tie_word_embeddings ({source.origin})",
                rule="a tied output layer is the embedding",
                remedy="Set tie_word_embeddings to false, if the model was trained so",
            )
        )


def _carry(source: Source, save: Path) -> None:
    save.mkdir(parents=True, exist_ok=True)
    temporary = save / f"{COMPANIONS}.tmp-{uuid.uuid4().hex}"
    try:
        temporary.mkdir()
        source.carry(temporary)
        os.rename(temporary, save / COMPANIONS)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _comment(source: Source) -> str:
    return (
        f"Made by lightseq import-hf from {source.origin}.\n"
        "Add data_path and save; lr, seq_length and the parallel sizes are suggestions."
    )
