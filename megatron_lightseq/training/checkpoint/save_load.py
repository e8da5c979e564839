"""Save and resume a run: Megatron's distributed checkpoints, made durable, verified and safe to read.

A checkpoint holds the weights and the optimizer's state in terms of the whole model, so it may be loaded on
any number of ranks and any parallel layout; learning rate schedule and counters; and each rank's random
state, which is restored when the layout is the same. Saving is collective over all ranks, and so is loading;
all ranks see one file system.
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
from megatron.core import __version__ as megatron_version
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import torch as megatron_strategy
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from megatron_lightseq import __version__
from megatron_lightseq.config import CheckpointConfig, PretrainConfig
from megatron_lightseq.errors import CheckpointError, explain
from megatron_lightseq.training.checkpoint.directory import CheckpointDirectory, fsync_files, iteration_of
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
    """What loading a checkpoint gave, beside the state that it filled in."""

    folder: Path
    position: Position
    random: dict[str, Any] | None
    """For :func:`~megatron_lightseq.training.checkpoint.random_state.restore_random_state`, once iterators are made."""


# ---- saving ---------------------------------------------------------------------------------------------------


class _PlainFileStrategy(megatron_strategy.TorchDistSaveShardedStrategy):
    """Megatron's ``torch_dist`` format, written by torch's own writer in this process.

    Megatron's writer forks worker processes from a process full of threads and spawns a manager that
    imports the main module again; it also synchronises a CUDA device, which there may be none of.
    """

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> None:
        by_key, _, _ = megatron_strategy._replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        dcp.save(
            megatron_strategy.mcore_to_pyt_state_dict(by_key, False),
            storage_writer=dcp.FileSystemWriter(checkpoint_dir, overwrite=False),
            planner=megatron_strategy.MCoreSavePlanner(
                dedup_replicated_tensors=False, flatten_state_dict=False
            ),
        )


def save_checkpoint(training: Training, root: Path, position: Position) -> Path:
    """Save everything that decides the next step under ``root``; the new checkpoint's folder.

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
                sharded_strategy=_PlainFileStrategy("torch_dist", 1),
            )
        (folder / RANDOM_FOLDER).mkdir(exist_ok=True)
        torch.save(random_state(), folder / _random_name(rank))
        names = _own_files(folder, rank)
        fsync_files(folder, names)
        records = record_files(folder, names)
    except (OSError, CheckpointException) as error:
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)  # half a checkpoint on a full disk helps nobody
        raise CheckpointError(
            explain(
                got=f"saving to {folder}: {_causes(error)}",
                rule="every rank must be able to write its part",
                remedy="Check free space and permissions; older checkpoints are untouched",
            )
        ) from error
    gathered: list[list[FileRecord]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, records)
    final = ""
    if rank == 0:
        files = tuple(sorted((record for part in gathered for record in part), key=lambda r: r.name))
        final = str(directory.commit(folder, _manifest(training, position, files)))
    return Path(_from_rank_0(final))


def _state(training: Training, *, is_loading: bool, optimizer: bool) -> dict[str, Any]:
    """Megatron's sharded state dict of a run; the same keys on every parallel layout."""
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
    """Files that this rank wrote; rank 0 answers for those that are nobody's in particular."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    own = {name for name in names if name.startswith(f"__{rank}_") or name == _random_name(rank)}
    if rank == 0:
        own |= {name for name in names if not name.startswith(("__", f"{RANDOM_FOLDER}/"))}
    return sorted(own)


def _random_name(rank: int) -> str:
    return f"{RANDOM_FOLDER}/rank_{rank:05d}.pt"


def _manifest(training: Training, position: Position, files: tuple[FileRecord, ...]) -> Manifest:
    return Manifest(
        iteration=position.iteration,
        consumed_samples=position.consumed_samples,
        model=model_identity(training),
        optimizer=optimizer_identity(training.config),
        data=data_identity(training.config),
        world=world_identity(training),
        config_fingerprint=config_fingerprint(training.config),
        versions={
            "torch": torch.__version__,
            "megatron_core": megatron_version,
            "megatron_lightseq": __version__,
        },
        files=files,
    )


def model_identity(training: Training) -> dict[str, Any]:
    """What two runs must share for one to use the other's weights."""
    model = training.config.model
    identity: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.query_groups,
        "kv_channels": model.head_dim,
        "padded_vocab_size": training.padded_vocab_size,
    }
    keys = (
        "position_embedding_type",
        "rotary_base",
        "rotary_percent",
        "normalization",
        "norm_epsilon",
        "swiglu",
        "untie_embeddings_and_output_weights",
        "add_bias_linear",
        "qk_layernorm",
    )
    identity.update({key: getattr(model, key) for key in keys})
    if model.position_embedding_type == "learned_absolute":
        identity["max_position_embeddings"] = (
            model.max_position_embeddings or training.config.training.seq_length
        )
    identity.update(_variants(training.config))
    return identity


def _variants(config: PretrainConfig) -> dict[str, Any]:
    """What a plain decoder does not have, so that checkpoints of one need not speak of it."""
    model, experts = config.model, config.experts
    found: dict[str, Any] = {}
    if model.multi_latent_attention:
        keys = ("multi_latent_attention", "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim")
        found.update({key: getattr(model, key) for key in (*keys, "v_head_dim")})
    if model.mtp_num_layers is not None:
        found["mtp_num_layers"] = model.mtp_num_layers
    if experts.num_experts is not None:
        found |= {"num_experts": experts.num_experts, "moe_ffn_hidden_size": config.expert_ffn_size}
        routed = ("moe_router_topk", "moe_shared_expert_intermediate_size", "moe_grouped_gemm")
        found.update({key: getattr(experts, key) for key in routed})
    return found


def optimizer_identity(config: PretrainConfig) -> dict[str, Any]:
    """What two runs must share for one to use the other's optimizer state."""
    return {
        "optimizer": config.optimizer.optimizer,
        "use_distributed_optimizer": config.parallel.use_distributed_optimizer,
        "bf16": config.training.bf16,
    }


def data_identity(config: PretrainConfig) -> dict[str, Any]:
    """What two runs must share for one to go on where the other stopped reading."""
    training = config.training
    return {
        "seed": training.seed,
        "seq_length": training.seq_length,
        "split": config.data.split,
        "train_iters * global_batch_size": training.train_iters * training.global_batch_size,
    }


def world_identity(training: Training) -> dict[str, int]:
    """What two runs must share for one to use the other's random state."""
    sizes, parallel = training.sizes, training.config.parallel
    experts = {
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_size,
    }
    return {
        "world_size": sizes.world_size,
        "tensor_model_parallel_size": sizes.tensor,
        "pipeline_model_parallel_size": sizes.pipeline,
        "context_parallel_size": sizes.context,
        **(experts if training.config.experts.num_experts is not None else {}),
    }


# ---- loading --------------------------------------------------------------------------------------------------


def load_checkpoint(training: Training, root: Path, settings: CheckpointConfig | None = None) -> Resumed:
    """Fill ``training`` from the newest checkpoint under ``root`` that verifies.

    Args:
        training: what to fill.
        root: folder of checkpoints.
        settings: what of them to load; default: as the configuration of ``training`` says.

    Raises:
        CheckpointError: there is none, it is of another model or optimizer, it holds anything but data, or,
            with ``strict_load``, the newest one is damaged.
    """
    settings = settings or training.config.checkpoint
    folder, manifest = find_checkpoint(root, strict=settings.strict_load)
    _check_same(manifest.model, model_identity(training), folder, "the model", "--load another folder")
    if not settings.finetune:
        _warn_of_other_order(manifest, data_identity(training.config), folder)
    with_optimizer = not (settings.no_load_optim or settings.finetune)
    if with_optimizer:
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
        random=_read_random(training, settings, folder, manifest),
    )


def find_checkpoint(root: Path, *, strict: bool) -> tuple[Path, Manifest]:
    """The newest checkpoint under ``root`` whose every file is as its manifest says; collective.

    The ranks hash the files between them. A damaged checkpoint is passed over with a warning that names the
    file, or refused if ``strict``.
    """
    directory = CheckpointDirectory(root=root)
    if dist.get_rank() == 0:
        directory.recover()
    names = [str(path) for path in directory.candidates()]
    for folder in map(Path, _from_rank_0(names)):
        manifest, problems = _verify(folder)
        if manifest is not None and not problems:
            return folder, manifest
        damage = explain(
            got=f"checkpoint {folder.name}: {'; '.join(problems)}",
            rule="every file of a checkpoint must be as its manifest says",
            remedy="Drop --strict-load to fall back to the one before"
            if strict
            else "The one before is tried",
        )
        if strict:
            raise CheckpointError(damage)
        if dist.get_rank() == 0:
            logger.warning(damage)
    raise CheckpointError(
        explain(
            got=f"no whole checkpoint in {root}",
            rule="--load names a folder in which --save has left one",
            remedy="Check the path, or drop --load to start afresh",
        )
    )


def _verify(folder: Path) -> tuple[Manifest | None, list[str]]:
    """A checkpoint's manifest and everything found wrong, the same on every rank."""
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


def _differences(saved: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    keys = [key for key in sorted({*saved, *own}) if saved.get(key) != own.get(key)]
    return ", ".join(f"{key} is {saved.get(key)} there and {own.get(key)} here" for key in keys)


def _warn_of_other_order(manifest: Manifest, own: Mapping[str, Any], folder: Path) -> None:
    """Going on with more steps or other data is legitimate, and no longer the run that was interrupted."""
    differences = _differences(manifest.data, own)
    if differences and dist.get_rank() == 0:
        logger.warning(
            "%s: %s: training samples come in another order, from number %d on",
            folder.name,
            differences,
            manifest.consumed_samples,
        )


def _warn_of_other_schedule(saved: Mapping[str, Any], own: Mapping[str, Any], folder: Path) -> None:
    """Another learning rate or a longer decay is legitimate too, and bends the curve where the run goes on."""
    counters = ("num_steps", "wd_incr_steps")
    differences = _differences(*({k: v for k, v in x.items() if k not in counters} for x in (saved, own)))
    if differences and dist.get_rank() == 0:
        logger.warning("%s: %s: the configuration's values are followed", folder.name, differences)


def _check_same(
    saved: Mapping[str, Any], own: Mapping[str, Any], folder: Path, what: str, remedy: str
) -> None:
    differences = _differences(saved, own)
    if not differences:
        return
    raise CheckpointError(
        explain(
            got=f"checkpoint {folder}: {differences}",
            rule=f"a checkpoint fits only {what} that it was saved from",
            remedy=f"Use the checkpoint's values, or {remedy}",
        )
    )


def _read_state(folder: Path, template: dict[str, Any]) -> dict[str, Any]:
    """Megatron's load, with nothing in the files executed."""
    with (folder / ".metadata").open("rb") as stream:
        load_metadata(stream)  # alone first: inside the collective its message would be buried
    try:
        with no_code_execution():
            state: dict[str, Any] = dist_checkpointing.load(template, str(folder))
    except (CheckpointException, KeyError, RuntimeError, AssertionError) as error:
        raise CheckpointError(
            explain(
                got=f"loading {folder}: {_causes(error)}",
                rule="a checkpoint holds every tensor of the model",
                remedy="--load another folder",
            )
        ) from error
    return state


def _read_random(
    training: Training, settings: CheckpointConfig, folder: Path, manifest: Manifest
) -> dict[str, Any] | None:
    """This rank's random state, None where it is not wanted or was saved on another layout."""
    if settings.no_load_rng or settings.finetune:
        return None
    if dict(manifest.world) != world_identity(training):
        if dist.get_rank() == 0:
            logger.warning(
                "%s was saved on another parallel layout: random states start from the seed", folder.name
            )
        return None
    with no_code_execution():
        state: dict[str, Any] = torch.load(folder / _random_name(dist.get_rank()))
    return state


def _causes(error: BaseException) -> str:
    """The errors themselves, by rank, out of torch's bundle of tracebacks."""
    if not isinstance(error, CheckpointException):
        return f"{type(error).__name__}: {error}"
    causes = [(rank, wrapped[0]) for rank, wrapped in error.failures.items()]
    return "; ".join(f"rank {rank}: {type(cause).__name__}: {cause}" for rank, cause in causes)


def _from_rank_0(value: Any) -> Any:
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
