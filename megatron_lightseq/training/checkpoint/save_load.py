"""Save and resume a run: Megatron's distributed checkpoints, made durable, verified and safe to read.

A checkpoint holds the weights and the optimizer state of the whole model, so that it can be loaded on any number of
ranks with any parallelism; the learning rate schedule and counters; and each rank's random state, which is restored if
the parallelism is the same. Saving and loading are collective over all ranks, which must share one file system.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megatron_lightseq.config import CheckpointConfig
from megatron_lightseq.config.load import to_yaml
from megatron_lightseq.errors import CheckpointError, explain
from megatron_lightseq.training.checkpoint.directory import (
    CheckpointDirectory,
    fsync_files,
    iteration_of,
    write_durably,
)
from megatron_lightseq.training.checkpoint.identity import (
    ROTARY_KEYS,
    attention_identity,
    data_identity,
    differences,
    differing,
    model_identity,
    optimizer_identity,
    world_identity,
)
from megatron_lightseq.training.checkpoint.lineage import Lineage
from megatron_lightseq.training.checkpoint.manifest import FileRecord, Manifest, record_files
from megatron_lightseq.training.checkpoint.optimizer_state import (
    load_optimizer_state,
    sharded_optimizer_state,
)
from megatron_lightseq.training.checkpoint.random_state import random_state
from megatron_lightseq.training.checkpoint.safe_load import (
    check_extra_state,
    load_metadata,
    no_code_execution,
)
from megatron_lightseq.training.checkpoint.sharded_files import PlainFileStrategy
from megatron_lightseq.training.checkpoint.weights import RECIPE_NAME, causes, versions
from megatron_lightseq.training.job.preflight import config_fingerprint
from megatron_lightseq.training.setup import Training
from megatron_lightseq.training.step import parameters_in_place

logger = logging.getLogger(__name__)

RANDOM_FOLDER = "random"


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """How far a run has come."""

    iteration: int
    """Optimizer steps taken."""
    consumed_samples: int
    """Sequences read for training, over all ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resumed:
    """What loading a checkpoint returns, in addition to the state that it restores."""

    folder: Path
    position: Position
    lineage: Lineage
    """The run that saved the checkpoint."""
    random: dict[str, Any] | None
    """For :func:`~megatron_lightseq.training.checkpoint.random_state.restore_random_state`, once iterators are made."""


# ---- saving ---------------------------------------------------------------------------------------------------


def save_checkpoint(
    training: Training, root: Path, position: Position, lineage: Lineage | None = None
) -> Path:
    """Save everything that the next step depends on; returns the new checkpoint's folder under ``root``.

    Afterwards, older checkpoints that the configuration does not ask to keep are removed.

    Args:
        training: what to save.
        root: folder of checkpoints.
        position: how far the run has come.
        lineage: the run; default: one without a name.

    Raises:
        CheckpointError: a rank could not write; older checkpoints are untouched.
    """
    directory = CheckpointDirectory(root=root)
    rank = dist.get_rank()
    folder = Path(_from_rank_0(str(directory.begin(position.iteration)) if rank == 0 else None))
    try:
        with parameters_in_place(training):
            dist_checkpointing.save(
                _state(training, is_loading=False, optimizer=True),
                str(folder),
                sharded_strategy=PlainFileStrategy(),
            )
        (folder / RANDOM_FOLDER).mkdir(exist_ok=True)
        torch.save(random_state(), folder / _random_name(rank))
        if rank == 0:
            write_durably(folder / RECIPE_NAME, to_yaml(training.config))
        names = _own_files(folder, rank)
        fsync_files(folder, names)
        records = record_files(folder, names)
    except (OSError, CheckpointException) as error:
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)  # an incomplete checkpoint only fills the disk
        raise CheckpointError(
            explain(
                got=f"saving to {folder}: {causes(error)}",
                rule="every rank must be able to write its part",
                remedy="Check free space and permissions; older checkpoints are untouched",
            )
        ) from error
    gathered: list[list[FileRecord]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, records)
    final = ""
    if rank == 0:
        files = tuple(sorted((record for part in gathered for record in part), key=lambda r: r.name))
        final = str(directory.commit(folder, _manifest(training, position, lineage or Lineage(), files)))
        settings = training.config.checkpoint
        directory.prune(keep_last=settings.save_keep_last, retain_interval=settings.save_retain_interval)
    return Path(_from_rank_0(final))


def _state(training: Training, *, is_loading: bool, optimizer: bool) -> dict[str, Any]:
    """Megatron's sharded state dict of a run; its keys do not depend on the parallelism."""
    metadata = {"dp_cp_group": training.collection.dp_cp}
    models = training.models
    state: dict[str, Any] = {
        ("model" if len(models) == 1 else f"model{index}"): model.sharded_state_dict(metadata=metadata)
        for index, model in enumerate(models)
    }
    if optimizer:
        weights = dict(state)
        state["optimizer"] = sharded_optimizer_state(training.optimizer, weights, is_loading=is_loading)
        state["scheduler"] = training.scheduler.state_dict()
    return state


def _own_files(folder: Path, rank: int) -> list[str]:
    """Files that this rank wrote; rank 0 also records those that belong to no particular rank."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    own = {name for name in names if name.startswith(f"__{rank}_") or name == _random_name(rank)}
    if rank == 0:
        own |= {name for name in names if not name.startswith(("__", f"{RANDOM_FOLDER}/"))}
    return sorted(own)


def _random_name(rank: int) -> str:
    return f"{RANDOM_FOLDER}/rank_{rank:05d}.pt"


def _manifest(
    training: Training, position: Position, lineage: Lineage, files: tuple[FileRecord, ...]
) -> Manifest:
    return Manifest(
        iteration=position.iteration,
        consumed_samples=position.consumed_samples,
        lineage=lineage,
        model={
            **model_identity(training.config, training.padded_vocab_size),
            **attention_identity(training.config),
        },
        optimizer=optimizer_identity(training.config),
        data=data_identity(training.config),
        world=world_identity(training),
        config_fingerprint=config_fingerprint(training.config),
        versions=versions(),
        files=files,
    )


# ---- loading --------------------------------------------------------------------------------------------------


def load_checkpoint(training: Training, root: Path, settings: CheckpointConfig | None = None) -> Resumed:
    """Restore ``training`` from the newest intact checkpoint under ``root``.

    Args:
        training: what to restore.
        root: folder of checkpoints.
        settings: what to load of them; default: as the configuration of ``training`` says.

    Raises:
        CheckpointError: there is no intact checkpoint, it is of another model or optimizer, it holds anything but data,
            or, with ``strict_load``, the newest one is damaged.
    """
    settings = settings or training.config.checkpoint
    folder, manifest = find_checkpoint(root, strict=settings.strict_load, iteration=settings.load_iteration)
    _check_model(training, settings, manifest, folder)
    if not settings.finetune:
        _warn_of_other_order(manifest, data_identity(training.config), folder)
    with_optimizer = not (settings.no_load_optim or settings.finetune)
    if with_optimizer:
        _check_has_optimizer(manifest, folder)
        _check_same(
            manifest.optimizer,
            optimizer_identity(training.config),
            folder,
            "the optimizer",
            "--no-load-optim",
        )
    state = _read_state(folder, _state(training, is_loading=True, optimizer=with_optimizer))
    for index, model in enumerate(training.models):
        weights = state["model" if len(training.models) == 1 else f"model{index}"]
        check_extra_state(weights)
        model.load_state_dict(weights)
    if with_optimizer:
        _warn_of_other_schedule(state["scheduler"], training.scheduler.state_dict(), folder)
        load_optimizer_state(training.optimizer, state["optimizer"])
        training.scheduler.load_state_dict(state["scheduler"])
    else:
        training.optimizer.reload_model_params()
    start = Position(iteration=0, consumed_samples=0)
    saved = Position(iteration=manifest.iteration, consumed_samples=manifest.consumed_samples)
    return Resumed(
        folder=folder,
        position=start if settings.finetune else saved,
        lineage=manifest.lineage,
        random=_read_random(training, settings, folder, manifest),
    )


def find_checkpoint(root: Path, *, strict: bool, iteration: int | None = None) -> tuple[Path, Manifest]:
    """The newest checkpoint under ``root`` whose files all match its manifest. Collective. Writes nothing.

    The ranks divide the files among them and hash them. A damaged checkpoint is skipped with a warning that names the
    file, or refused if ``strict``. Checkpoints of other runs than the one that saved last are not considered, unless
    ``iteration`` asks for one.
    """
    directory = CheckpointDirectory(root=root)
    found, present = _from_rank_0(_choices(directory, iteration) if dist.get_rank() == 0 else None)
    for folder in map(Path, found):
        manifest, problems = _verify(folder)
        if manifest is not None and not problems:
            return folder, manifest
        damage = explain(
            got=f"checkpoint {folder.name}: {'; '.join(problems)}",
            rule="every file of a checkpoint must match its manifest",
            remedy=f"--load-iteration takes any of {present}"
            if iteration is not None
            else "Remove --strict-load to fall back to the previous one"
            if strict
            else "Falling back to the previous one",
        )
        if strict or iteration is not None:
            raise CheckpointError(damage)
        if dist.get_rank() == 0:
            logger.warning(damage)
    raise _not_found(root, iteration, present)


def _choices(directory: CheckpointDirectory, iteration: int | None) -> tuple[list[str], list[int]]:
    """The folders to try, in order, and the steps of all checkpoints."""
    present = directory.iterations()
    if iteration is None:
        return [str(path) for path in directory.candidates()], present
    return [str(directory.at(iteration))] if iteration in present else [], present


def _not_found(root: Path, iteration: int | None, present: list[int]) -> CheckpointError:
    if iteration is not None:
        got, remedy = f"no checkpoint of step {iteration} in {root}", "Check the path"
        rule = "--load-iteration must be the step of a checkpoint in the folder that --load names"
    else:
        got, remedy = (
            f"no intact checkpoint in {root}",
            "Check the path, or remove --load to start from scratch",
        )
        rule = "--load must name a folder that a run has saved a checkpoint to"
    if present:
        remedy = f"The folder has checkpoints of the steps {present}: choose one with --load-iteration"
    return CheckpointError(explain(got=got, rule=rule, remedy=remedy))


def _verify(folder: Path) -> tuple[Manifest | None, list[str]]:
    """A checkpoint's manifest and everything that is wrong with its files, the same on every rank."""
    manifest: Manifest | None = None
    own: list[str] = []
    try:
        manifest = Manifest.read(folder)
        if manifest.iteration != iteration_of(folder):
            own.append(f"manifest.json is of iteration {manifest.iteration}")
        own += manifest.problems(folder, part=dist.get_rank(), num_parts=dist.get_world_size())
    except (CheckpointError, OSError) as error:
        own.append(str(error))
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, own)
    return manifest, sorted({problem for part in gathered for problem in part})


def _check_model(training: Training, settings: CheckpointConfig, manifest: Manifest, folder: Path) -> None:
    """Refuse weights of another model; report what changes the model's function and is allowed to."""
    window = attention_identity(training.config)
    saved = {key: value for key, value in manifest.model.items() if key not in window}
    saved_window = {key: manifest.model.get(key) for key in window}
    own = model_identity(training.config, training.padded_vocab_size)
    may_change = ROTARY_KEYS if settings.finetune else ()
    remedy = "--load another folder"
    if set(differing(saved, own)) <= set(ROTARY_KEYS):
        remedy = "start from its weights alone with --finetune, which may change them (context extension)"
    theirs, ours = ({key: value for key, value in x.items() if key not in may_change} for x in (saved, own))
    _check_same(theirs, ours, folder, "the model", remedy)
    changed = [text for text in (differences(saved, own), differences(saved_window, window)) if text]
    if changed and dist.get_rank() == 0:
        logger.warning(
            "%s: %s: training continues with the values of this run", folder.name, ", ".join(changed)
        )


def _check_has_optimizer(manifest: Manifest, folder: Path) -> None:
    if not manifest.optimizer:
        raise CheckpointError(
            explain(
                got=f"checkpoint {folder}, which holds weights only, without --finetune",
                rule="a run is resumed with the state of its optimizer",
                remedy="Start from the weights with --finetune",
            )
        )


def _warn_of_other_order(manifest: Manifest, own: Mapping[str, Any], folder: Path) -> None:
    """Continuing with more steps or other data is allowed, but it is no longer the run that was interrupted."""
    found = differences(manifest.data, own)
    if found and dist.get_rank() == 0:
        logger.warning(
            "%s: %s: training samples come in a different order, from sample %d on",
            folder.name,
            found,
            manifest.consumed_samples,
        )


def _warn_of_other_schedule(saved: Mapping[str, Any], own: Mapping[str, Any], folder: Path) -> None:
    """Another learning rate or a longer decay is allowed, too; the curve bends where the run continues."""
    counters = ("num_steps", "wd_incr_steps")
    found = differences(*({k: v for k, v in x.items() if k not in counters} for x in (saved, own)))
    if found and dist.get_rank() == 0:
        logger.warning("%s: %s: the values of this run are used", folder.name, found)


def _check_same(
    saved: Mapping[str, Any], own: Mapping[str, Any], folder: Path, what: str, remedy: str
) -> None:
    found = differences(saved, own)
    if not found:
        return
    raise CheckpointError(
        explain(
            got=f"checkpoint {folder}: {found}",
            rule=f"a checkpoint fits only {what} that it was saved from",
            remedy=f"Use the checkpoint's values, or {remedy}",
        )
    )


def _read_state(folder: Path, template: dict[str, Any]) -> dict[str, Any]:
    """Megatron's load, without executing anything in the files."""
    with (folder / ".metadata").open("rb") as stream:
        load_metadata(stream)  # first on its own: an error inside the collective would be hard to find
    try:
        with no_code_execution():
            state: dict[str, Any] = dist_checkpointing.load(template, str(folder))
    except (CheckpointException, KeyError, RuntimeError, AssertionError) as error:
        raise CheckpointError(
            explain(
                got=f"loading {folder}: {causes(error)}",
                rule="a checkpoint must hold every tensor of the model",
                remedy="--load another folder",
            )
        ) from error
    return state


def _read_random(
    training: Training, settings: CheckpointConfig, folder: Path, manifest: Manifest
) -> dict[str, Any] | None:
    """This rank's random state; None if it is not wanted, or was saved with other parallel sizes."""
    if settings.no_load_rng or settings.finetune:
        return None
    if dict(manifest.world) != world_identity(training):
        if dist.get_rank() == 0:
            logger.warning(
                "%s was saved with other parallel sizes: random states start from the seed", folder.name
            )
        return None
    with no_code_execution():
        state: dict[str, Any] = torch.load(folder / _random_name(dist.get_rank()))
    return state


def _from_rank_0(value: Any) -> Any:
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
