"""Save a run: Megatron's distributed checkpoints, made durable.

A checkpoint holds the weights and the optimizer state of the whole model, so that it can be loaded on any number of
ranks with any parallelism; the learning rate schedule and counters; and each rank's random state. Saving is collective
over all ranks, which must share one file system. It has two parts: a *snapshot* of this rank's state, and *writing*
it, which needs nothing of the training state any more and may happen in another thread, with a group of its own.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from torch.distributed.checkpoint.api import CheckpointException

from megatron_lightseq.config.load import to_yaml
from megatron_lightseq.errors import CheckpointError, explain
from megatron_lightseq.training.checkpoint.directory import (
    CheckpointDirectory,
    fsync_files,
)
from megatron_lightseq.training.checkpoint.finite import check_finite, tensors_of
from megatron_lightseq.training.checkpoint.host_copies import HostCopies
from megatron_lightseq.training.checkpoint.identity import (
    attention_identity,
    data_identity,
    model_identity,
    optimizer_identity,
    world_identity,
)
from megatron_lightseq.training.checkpoint.manifest import FileRecord, Manifest, record_files
from megatron_lightseq.training.checkpoint.random_state import random_state
from megatron_lightseq.training.checkpoint.sharded_files import PlainFileStrategy
from megatron_lightseq.training.checkpoint.state import (
    RANDOM_FOLDER,
    Position,
    RunRecord,
    random_name,
    sharded_state,
)
from megatron_lightseq.training.checkpoint.weights import RECIPE_NAME, causes, versions
from megatron_lightseq.training.job.preflight import config_fingerprint
from megatron_lightseq.training.setup import Training
from megatron_lightseq.training.step import parameters_in_place

COMMON_NAME = "common.pt"
"""What all ranks share, in Megatron's format."""
Group = dist.ProcessGroup | None
"""Of all ranks; None is torch's default group."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """What one rank writes."""

    position: Position
    pieces: dict[str, Any]
    """This rank's pieces of tensors and objects, in torch's form."""
    copies: list[tuple[str, torch.Tensor]] | None
    """Copies of this rank's tensors, with their keys; None, on all ranks, if the tensors are those of training."""
    files: dict[str, bytes]
    """Small files of this rank, by name."""
    num_bytes: int
    manifest: Callable[[tuple[FileRecord, ...]], Manifest]


def save_checkpoint(
    training: Training, root: Path, position: Position, record: RunRecord | None = None
) -> Path:
    """Save everything that the next step depends on; returns the new checkpoint's folder under ``root``.

    Afterwards, older checkpoints that the configuration does not ask to keep are removed.

    Args:
        training: what to save.
        root: folder of checkpoints.
        position: how far the run has come.
        record: what the checkpoint says about the run; default: nothing.

    Raises:
        CheckpointError: a rank could not write, or holds numbers that are not finite; older checkpoints are untouched.
    """
    check_finite(tensors_of(training))
    return write_snapshot(take_snapshot(training, position, record or RunRecord()), training, root)


def take_snapshot(
    training: Training,
    position: Position,
    record: RunRecord,
    copies: HostCopies | None = None,
    *,
    is_checked: bool = False,
) -> Snapshot:
    """This rank's part of a checkpoint. Collective.

    Args:
        training: what to save.
        position: how far the run has come.
        record: what the checkpoint says about the run.
        copies: where to copy tensors; default: nowhere, and training must not go on before the snapshot is written.
        is_checked: a state of the same form has been saved before, so that its sharding need not be checked again.
    """
    with parameters_in_place(training):
        state = sharded_state(training, is_loading=False, optimizer=True)
        sharded, common = save_preprocess(state, not is_checked)
        pieces = PlainFileStrategy.pieces_of(sharded)
        tensors = [
            piece for group in pieces.values() for piece in group if isinstance(piece.data, torch.Tensor)
        ]
        if copies is not None:
            for piece, copy in zip(tensors, copies.of([piece.data for piece in tensors]), strict=True):
                piece.data = copy
        copied = [(piece.key, piece.data) for piece in tensors if piece.data.is_floating_point()]
    rank = dist.get_rank()
    files = {random_name(rank): _saved(random_state())}
    if rank == 0:
        files |= {COMMON_NAME: _saved(common), RECIPE_NAME: to_yaml(training.config).encode()}
    return Snapshot(
        position=position,
        pieces=PlainFileStrategy.in_torchs_form(pieces),
        copies=None if copies is None else copied,
        files=files,
        num_bytes=sum(piece.data.nbytes for piece in tensors),
        manifest=_manifest_of(training, position, record),
    )


def write_snapshot(snapshot: Snapshot, training: Training, root: Path, group: Group = None) -> Path:
    """Write a checkpoint and make it durable; returns its folder. Collective over ``group``, in any thread.

    Args:
        snapshot: of this rank.
        training: for its configuration only.
        root: folder of checkpoints.
        group: of all ranks.

    Raises:
        CheckpointError: a rank could not write, or has copied numbers that are not finite; every rank raises it, and
            older checkpoints are untouched.
    """
    if snapshot.copies is not None:
        check_finite(snapshot.copies, group)
    directory, rank = CheckpointDirectory(root=root), dist.get_rank()
    needed = sum(_gathered(snapshot.num_bytes, group))
    folder = _on_rank_0(lambda: directory.begin(snapshot.position.iteration, needed), root, group)
    records: list[FileRecord] = []
    problem = ""
    try:
        records = _write_own(snapshot, folder, group, rank)
    except (OSError, CheckpointException) as error:
        problem = causes(error)
    outcomes = _gathered((records, problem), group)
    problems = list(dict.fromkeys(text for _, text in outcomes if text))
    if problems:
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)  # an incomplete checkpoint only fills the disk
        raise _failed(folder, "; ".join(problems))
    files = tuple(sorted((record for part, _ in outcomes for record in part), key=lambda r: r.name))

    def commit() -> Path:
        final = directory.commit(folder, snapshot.manifest(files))
        settings = training.config.checkpoint
        directory.prune(keep_last=settings.save_keep_last, retain_interval=settings.save_retain_interval)
        return final

    return _on_rank_0(commit, folder, group)


def _write_own(snapshot: Snapshot, folder: Path, group: Group, rank: int) -> list[FileRecord]:
    """The files of this rank, on the disk, with their hashes."""
    PlainFileStrategy(group=group).write(snapshot.pieces, folder)
    (folder / RANDOM_FOLDER).mkdir(exist_ok=True)
    for name, content in snapshot.files.items():
        (folder / name).write_bytes(content)
    if rank == 0:
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    names = _own_files(folder, rank)
    fsync_files(folder, names)
    return record_files(folder, names)


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _gathered(value: Any, group: Group) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value, group=group)
    return found


def _on_rank_0(action: Callable[[], Path], where: Path, group: Group) -> Path:
    """What ``action`` returns on rank 0, or its error, on every rank. Collective."""
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            box = [action()]
        except (OSError, CheckpointError) as error:
            box = [f"rank 0: {type(error).__name__}: {error}" if isinstance(error, OSError) else error]
    dist.broadcast_object_list(box, src=0, group=group)
    if isinstance(box[0], Path):
        return box[0]
    raise box[0] if isinstance(box[0], CheckpointError) else _failed(where, str(box[0]))


def _failed(folder: Path, problems: str) -> CheckpointError:
    return CheckpointError(
        explain(
            got=f"saving to {folder}: {problems}",
            rule="every rank must be able to write its part",
            remedy="Check free space and permissions; older checkpoints are untouched",
        )
    )


def _own_files(folder: Path, rank: int) -> list[str]:
    """Files that this rank wrote; rank 0 also records those that belong to no particular rank."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    own = {name for name in names if name.startswith(f"__{rank}_") or name == random_name(rank)}
    if rank == 0:
        own |= {name for name in names if not name.startswith(("__", f"{RANDOM_FOLDER}/"))}
    return sorted(own)


def _manifest_of(
    training: Training, position: Position, record: RunRecord
) -> Callable[[tuple[FileRecord, ...]], Manifest]:
    config = training.config
    world, model = world_identity(training), model_identity(config, training.padded_vocab_size)

    def manifest(files: tuple[FileRecord, ...]) -> Manifest:
        return Manifest(
            iteration=position.iteration,
            consumed_samples=position.consumed_samples,
            lineage=record.lineage,
            corpus=record.corpus,
            losses=record.losses,
            model={**model, **attention_identity(config)},
            optimizer=optimizer_identity(config),
            data=data_identity(config),
            world=world,
            config_fingerprint=config_fingerprint(config),
            versions=versions(),
            files=files,
        )

    return manifest
