"""Checkpoints that hold weights only: made from another format, to start runs from with ``--finetune``."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import __version__ as megatron_version
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megatron_lightseq import __version__
from megatron_lightseq.config import PretrainConfig
from megatron_lightseq.config.load import to_yaml
from megatron_lightseq.errors import CheckpointError, explain
from megatron_lightseq.training.checkpoint.directory import (
    CheckpointDirectory,
    fsync_files,
    write_durably,
)
from megatron_lightseq.training.checkpoint.identity import (
    attention_identity,
    data_identity,
    model_identity,
)
from megatron_lightseq.training.checkpoint.lineage import Lineage
from megatron_lightseq.training.checkpoint.manifest import Manifest, record_files
from megatron_lightseq.training.checkpoint.sharded_files import PlainFileStrategy, Supply
from megatron_lightseq.training.job.preflight import config_fingerprint

RECIPE_NAME = "recipe.yaml"
"""The whole configuration of the run that has saved a checkpoint."""


def save_weights(
    root: Path, config: PretrainConfig, padded_vocab_size: int, state: dict[str, Any], supply: Supply
) -> Path:
    """Write a checkpoint of iteration 0 without optimizer state, each tensor at the moment in which it is made.

    Args:
        root: folder of checkpoints.
        config: the recipe of the model.
        padded_vocab_size: rows of its embedding.
        state: Megatron's sharded state dict; its tensors may be on the meta device.
        supply: makes the tensors.

    Returns:
        The new checkpoint's folder. If anything is raised, nothing of it is left.

    Raises:
        CheckpointError: the folder cannot be written to.
    """
    directory = CheckpointDirectory(root=root)
    try:
        folder = directory.begin(0)
    except OSError as error:
        raise _cannot_write(root, error) from error
    try:
        dist_checkpointing.save(state, str(folder), sharded_strategy=PlainFileStrategy(supply))
        write_durably(folder / RECIPE_NAME, to_yaml(config))
        names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        fsync_files(folder, names)
        manifest = _manifest(config, padded_vocab_size, tuple(record_files(folder, names)))
        return directory.commit(folder, manifest)
    except (OSError, CheckpointException) as error:
        raise _cannot_write(root, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # after a commit it has another name


def _cannot_write(root: Path, error: OSError | CheckpointException) -> CheckpointError:
    return CheckpointError(
        explain(
            got=f"saving to {root}: {causes(error)}",
            rule="a checkpoint is written to that folder",
            remedy="Check free space and permissions; nothing half-written is left",
        )
    )


def _manifest(config: PretrainConfig, padded_vocab_size: int, files: tuple[Any, ...]) -> Manifest:
    return Manifest(
        iteration=0,
        consumed_samples=0,
        lineage=Lineage.fresh(),
        model={**model_identity(config, padded_vocab_size), **attention_identity(config)},
        optimizer={},
        data=data_identity(config),
        world={},
        config_fingerprint=config_fingerprint(config),
        versions=versions(),
        files=files,
    )


def versions() -> Mapping[str, str]:
    """What a manifest says about the programs that wrote the checkpoint."""
    return {
        "torch": torch.__version__,
        "megatron_core": megatron_version,
        "megatron_lightseq": __version__,
    }


def causes(error: BaseException) -> str:
    """The errors themselves, by rank, taken from torch's collection of tracebacks."""
    if not isinstance(error, CheckpointException):
        return f"{type(error).__name__}: {error}"
    causes = [(rank, wrapped[0]) for rank, wrapped in error.failures.items()]
    return "; ".join(f"rank {rank}: {type(cause).__name__}: {cause}" for rank, cause in causes)
