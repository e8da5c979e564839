"""Which checkpoint of a folder to load: the newest that is intact and not suspect."""

from __future__ import annotations

import logging
import stat
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_lightseq.errors import CheckpointError, explain
from megatron_lightseq.training.checkpoint.directory import CheckpointDirectory, iteration_of
from megatron_lightseq.training.checkpoint.health_marks import failures, is_healthy, is_suspect
from megatron_lightseq.training.checkpoint.manifest import MANIFEST_NAME, Manifest

logger = logging.getLogger(__name__)


def find_checkpoint(
    root: Path, *, strict: bool, iteration: int | None = None, healthy: bool = False
) -> tuple[Path, Manifest]:
    """The newest checkpoint under ``root`` whose files all match its manifest. Collective. Writes nothing.

    The ranks divide the files among them and hash them. A damaged checkpoint is skipped with a warning that names the
    file, or refused if ``strict``. Checkpoints of other runs than the one that saved last are not considered, nor those
    that are suspect (:mod:`~megatron_lightseq.training.checkpoint.health_marks`), unless ``iteration`` asks for one.
    """
    directory = CheckpointDirectory(root=root)
    found, present = from_rank_0(_choices(directory, iteration, healthy) if dist.get_rank() == 0 else None)
    for folder in map(Path, found):
        manifest, problems = _verify(folder)
        if manifest is not None and not problems:
            if dist.get_rank() == 0:
                _warn_of_writers(folder, manifest)
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


def _warn_of_writers(folder: Path, manifest: Manifest) -> None:
    """Hashes in a manifest protect against damage, not against somebody who may rewrite both."""
    paths = [folder, folder / MANIFEST_NAME, *(folder / record.name for record in manifest.files)]
    writable = [path for path in paths if path.stat().st_mode & stat.S_IWOTH]
    if writable:
        logger.warning(
            "%s can be written by every user of this machine: chmod -R o-w %s", writable[0], folder.parent
        )


def _choices(
    directory: CheckpointDirectory, iteration: int | None, healthy: bool
) -> tuple[list[str], list[int]]:
    """The folders to try, in order, and the steps of all checkpoints."""
    present = directory.iterations()
    if iteration is None:
        found = directory.candidates()
        for path in filter(is_suspect, found):
            logger.warning(
                "%s is passed over: the step after it was bad %d times; --load-iteration %d loads it nevertheless",
                path.name,
                failures(path),
                iteration_of(path),
            )
        wanted = is_healthy if healthy else lambda path: not is_suspect(path)
        return [str(path) for path in found if wanted(path)], present
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


def from_rank_0(value: Any) -> Any:
    """What rank 0 passes in, on every rank. Collective."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
