"""What is saved of a run: its position, what a checkpoint says about it, and Megatron's sharded state dict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_lightseq.training.checkpoint.lineage import Lineage
from megatron_lightseq.training.checkpoint.optimizer_state import sharded_optimizer_state
from megatron_lightseq.training.setup import Training

RANDOM_FOLDER = "random"


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """How far a run has come."""

    iteration: int
    """Optimizer steps taken."""
    consumed_samples: int
    """Sequences read for training, over all ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """What a checkpoint says about the run that saves it, in addition to its state."""

    lineage: Lineage = field(default_factory=Lineage)
    corpus: Mapping[str, Any] = field(default_factory=dict)
    """Corpus, mixture and tokenizer, by name; empty: not known."""
    losses: tuple[float, ...] = ()
    """Of the last good steps."""


def sharded_state(training: Training, *, is_loading: bool, optimizer: bool) -> dict[str, Any]:
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


def random_name(rank: int) -> str:
    """The file with the random state of a rank."""
    return f"{RANDOM_FOLDER}/rank_{rank:05d}.pt"
