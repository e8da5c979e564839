"""Activation checkpoints of torch that never repeat attention (DistFlashAttn, arXiv 2310.03294, section 3.3).

A checkpoint of transformers runs a layer twice. The first run leaves attention's output and log-sum-exp in a stash
that belongs to that checkpoint; the second takes them, without attention's arithmetic or communication.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from megatron_lightseq.attention.stash import AttentionStash
from megatron_lightseq.errors import UnsupportedError, explain


@dataclass(frozen=True, slots=True)
class CheckpointRun:
    """One of the two runs of a checkpoint, and what it shares with the other."""

    stash: AttentionStash
    replaying: bool
    """True in the run that backward makes."""


_current: ContextVar[CheckpointRun | None] = ContextVar("lightseq_checkpoint_run", default=None)


def current_run() -> CheckpointRun | None:
    """The run of the checkpoint that is being executed in this thread; None outside of such checkpoints."""
    return _current.get()


@contextlib.contextmanager
def _within(run: CheckpointRun) -> Iterator[None]:
    token = _current.set(run)
    try:
        yield
    finally:
        _current.reset(token)


def keep_attention() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """``context_fn`` of ``torch.utils.checkpoint.checkpoint(..., use_reentrant=False)``: keeps attention's results."""
    stash = AttentionStash()
    return _within(CheckpointRun(stash, replaying=False)), _within(CheckpointRun(stash, replaying=True))


def keep_attention_in(model: torch.nn.Module) -> int:
    """Make every checkpoint of a transformers model keep attention; call it after ``gradient_checkpointing_enable``.

    For trainers: ``TrainingArguments(gradient_checkpointing_kwargs=...)`` cannot hold a function, as it is written as
    JSON. Only these modules are changed, not their classes. A second call changes nothing.

    Returns:
        The number of modules whose checkpoints keep attention; 0 if checkpointing is off.

    Raises:
        UnsupportedError: the checkpoints are reentrant, and take no ``context_fn``.
    """
    found = 0
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is None or not getattr(module, "gradient_checkpointing", False):
            continue
        keywords: dict[str, Any] = getattr(function, "keywords", {})
        if keywords.get("use_reentrant") is not False:
            raise UnsupportedError(
                explain(
                    got="gradient checkpointing with use_reentrant=True",
                    rule="attention is kept by checkpoints that are not reentrant",
                    remedy="Set gradient_checkpointing_kwargs={'use_reentrant': False}",
                )
            )
        if "context_fn" not in keywords:
            module._gradient_checkpointing_func = functools.partial(function, context_fn=keep_attention)  # type: ignore[assignment]
        found += 1
    return found
