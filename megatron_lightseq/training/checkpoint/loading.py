"""Resume a run from a checkpoint: verified, and safe to read.

What :mod:`~megatron_lightseq.training.checkpoint.saving` has written can be loaded on any number of ranks with any
parallelism; each rank's random state is restored if the parallelism is the same. Loading is collective over all ranks,
which must share one file system.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_lightseq.config import CheckpointConfig
from megatron_lightseq.errors import CheckpointError, explain
from megatron_lightseq.megatron.adapters import is_adapter
from megatron_lightseq.training.checkpoint.find import find_checkpoint
from megatron_lightseq.training.checkpoint.identity import (
    ADAPTER_KEYS,
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
from megatron_lightseq.training.checkpoint.manifest import Manifest
from megatron_lightseq.training.checkpoint.optimizer_state import (
    load_optimizer_state,
)
from megatron_lightseq.training.checkpoint.pickle_scan import MAX_BYTES
from megatron_lightseq.training.checkpoint.safe_load import (
    check_extra_state,
    load_metadata,
    no_code_execution,
)
from megatron_lightseq.training.checkpoint.state import Position, random_name, sharded_state
from megatron_lightseq.training.checkpoint.weights import causes
from megatron_lightseq.training.plain_files import check_regular, read_plain
from megatron_lightseq.training.setup import Training

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Resumed:
    """What loading a checkpoint returns, in addition to the state that it restores."""

    folder: Path
    position: Position
    lineage: Lineage
    """The run that saved the checkpoint."""
    losses: tuple[float, ...]
    """Of the good steps before it; empty for a new run."""
    random: dict[str, Any] | None
    """For :func:`~megatron_lightseq.training.checkpoint.random_state.restore_random_state`, once iterators are made."""


def load_checkpoint(
    training: Training,
    root: Path,
    settings: CheckpointConfig | None = None,
    *,
    corpus: Mapping[str, Any] | None = None,
    healthy: bool = False,
) -> Resumed:
    """Restore ``training`` from the newest intact checkpoint under ``root``.

    Args:
        training: what to restore.
        root: folder of checkpoints.
        settings: what to load of them; default: as the configuration of ``training`` says.
        corpus: what this run reads, as in :class:`RunRecord`; default: not compared.
        healthy: consider only checkpoints after which a step was good.

    Raises:
        CheckpointError: there is no intact checkpoint, it is of another model, optimizer or corpus, it holds anything
            but data, or, with ``strict_load``, the newest one is damaged.
    """
    settings = settings or training.config.checkpoint
    folder, manifest = find_checkpoint(
        root, strict=settings.strict_load, iteration=settings.load_iteration, healthy=healthy
    )
    _check_model(training, settings, manifest, folder)
    if not settings.finetune:
        _check_corpus(settings, manifest, corpus or {}, folder)
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
    template = sharded_state(training, is_loading=True, optimizer=with_optimizer)
    new_adapters = training.config.tuning.lora_dim is not None and "lora_dim" not in manifest.model
    if new_adapters:
        _leave_adapters_out(template)
    state = _read_state(folder, template)
    for index, model in enumerate(training.models):
        weights = state["model" if len(training.models) == 1 else f"model{index}"]
        check_extra_state(weights)
        if new_adapters:  # they keep their initial weights
            weights |= {name: value for name, value in model.state_dict().items() if is_adapter(name)}
        model.load_state_dict(weights)
    if with_optimizer:
        _warn_of_other_schedule(state["scheduler"], training.scheduler.state_dict(), folder)
        load_optimizer_state(training.optimizer, state["optimizer"])
        training.scheduler.num_steps = 0  # Megatron adds the loaded number to it
        training.scheduler.load_state_dict(state["scheduler"])
    else:
        training.optimizer.reload_model_params()
    start = Position(iteration=0, consumed_samples=0)
    saved = Position(iteration=manifest.iteration, consumed_samples=manifest.consumed_samples)
    return Resumed(
        folder=folder,
        position=start if settings.finetune else saved,
        lineage=manifest.lineage,
        losses=() if settings.finetune else manifest.losses,
        random=_read_random(training, settings, folder, manifest),
    )


def _leave_adapters_out(template: dict[str, Any]) -> None:
    """A model without adapters gets new ones; see :mod:`megatron_lightseq.megatron.adapters`."""
    for key, part in template.items():
        if key.startswith("model"):
            template[key] = {name: value for name, value in part.items() if not is_adapter(name)}


def _check_model(training: Training, settings: CheckpointConfig, manifest: Manifest, folder: Path) -> None:
    """Refuse weights of another model; report what changes the model's function and is allowed to."""
    window = attention_identity(training.config)
    saved = {key: value for key, value in manifest.model.items() if key not in window}
    saved_window = {key: manifest.model.get(key) for key in window}
    own = model_identity(training.config, training.padded_vocab_size)
    may_add = () if "lora_dim" in saved else ADAPTER_KEYS
    may_change = (*ROTARY_KEYS, *may_add) if settings.finetune else ()
    remedy = "--load another folder"
    if set(differing(saved, own)) <= {*ROTARY_KEYS, *may_add}:
        remedy = "start from its weights alone with --finetune, which may change RoPE and add adapters"
    theirs, ours = ({key: value for key, value in x.items() if key not in may_change} for x in (saved, own))
    _check_same(theirs, ours, folder, "the model", remedy)
    changed = [text for text in (differences(saved, own), differences(saved_window, window)) if text]
    if changed and dist.get_rank() == 0:
        logger.warning(
            "%s: %s: training continues with the values of this run", folder.name, ", ".join(changed)
        )


def _check_corpus(
    settings: CheckpointConfig, manifest: Manifest, own: Mapping[str, Any], folder: Path
) -> None:
    """Refuse to continue on other data: the position in the data would mean something else, or nothing."""
    shared = [key for key in own if key in manifest.corpus]
    found = differences(*({key: known[key] for key in shared} for known in (manifest.corpus, own)))
    if found and not settings.data_may_change:
        raise CheckpointError(
            explain(
                got=f"checkpoint {folder}: {found}",
                rule="a run continues with the corpus, the mixture and the tokenizer that it began with",
                remedy="Use these, continue on other data with --data-may-change, or start from the weights with "
                "--finetune",
            )
        )
    if found and dist.get_rank() == 0:
        logger.warning("%s: %s: training continues on other data", folder.name, found)


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
    try:
        # First on its own: an error inside the collective would be hard to find.
        load_metadata(io.BytesIO(read_plain(folder / ".metadata", MAX_BYTES)))
        with no_code_execution():
            state: dict[str, Any] = dist_checkpointing.load(template, str(folder))
    except CheckpointError:
        raise
    except Exception as error:  # anything, where a table of contents does not fit the files
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
    return load_plain(folder / random_name(dist.get_rank()))


def load_plain(path: Path) -> dict[str, Any]:
    """Numbers, texts and tensors that ``torch.save`` has written; raises CheckpointError for anything else."""
    try:
        check_regular(path)
        with no_code_execution():
            state = torch.load(path)
        if not isinstance(state, dict):
            raise TypeError(f"it holds a {type(state).__name__}")
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            explain(
                got=f"{path}: {causes(error)}",
                rule="a checkpoint holds the random state of every rank that saved it",
                remedy="Start from the seed with --no-load-rng, or --load another folder",
            )
        ) from error
    return state
