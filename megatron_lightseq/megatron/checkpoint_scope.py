"""Keep attention results across Megatron's activation recomputation.

LightSeq's rematerialisation-aware checkpointing (DistFlashAttn, arXiv 2310.03294, section 3.3) moves checkpoint
boundaries to the attention output, so that recomputing a layer never recomputes attention. Here the boundaries
stay where Megatron puts them, and the attention output and log-sum-exp are stored with the checkpoint instead:

    CheckpointFunction.forward    no_grad: attention runs, (out, lse) is stored in this checkpoint's scope
    CheckpointFunction.backward   the layer runs again: attention takes (out, lse) from the same scope

A scope is an attribute of its checkpoint's autograd context. Results are therefore found whatever the order in which
micro-batches run (1F1B, interleaved, several losses in one backward), they are freed with their graph, and an exception
leaves nothing behind.

Megatron calls ``CheckpointFunction`` for full recomputation (uniform and block) and for ``core_attn`` alone. Other
checkpoints (Transformer Engine's for FP8, torch's) have no scope: under them attention is recomputed, correctly.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from megatron.core.tensor_parallel import random

from megatron_lightseq.attention.stash import AttentionStash

# Set during one CheckpointFunction call. Per thread, because autograd runs backward on other threads.
_current: ContextVar[CheckpointScope | None] = ContextVar("checkpoint_scope", default=None)


class CheckpointScope:
    """The attention results of one checkpoint: a FIFO for each attention module that is called in it."""

    def __init__(self) -> None:
        self.replaying = False
        """False during the checkpoint's forward, True while its backward runs the same modules again."""
        self._stashes: dict[int, AttentionStash] = {}

    def stash(self, module: torch.nn.Module) -> AttentionStash:
        """The FIFO of a module, whose calls are replayed in the order in which they were made."""
        return self._stashes.setdefault(id(module), AttentionStash())


def current_scope() -> CheckpointScope | None:
    """The scope of the checkpoint that is running, or None outside of checkpoints."""
    return _current.get()


def track_checkpoints() -> None:
    """Give every Megatron checkpoint a scope from now on; a second call does nothing.

    This wraps the two methods of ``CheckpointFunction`` (megatron/core/tensor_parallel/random.py). It does not affect
    models without our attention: their scopes stay empty.
    """
    function = random.CheckpointFunction
    if hasattr(function.forward, "tracks_checkpoints"):
        return
    function.forward = staticmethod(_wrapped(function.forward, _new_scope))
    function.backward = staticmethod(_wrapped(function.backward, _replayed_scope))


def _wrapped(method: Callable[..., Any], scope_of: Callable[[Any], CheckpointScope]) -> Callable[..., Any]:
    def call(ctx: Any, *args: Any) -> Any:
        token = _current.set(scope_of(ctx))
        try:
            return method(ctx, *args)
        finally:
            _current.reset(token)

    call.tracks_checkpoints = True  # type: ignore[attr-defined]
    return call


def _new_scope(ctx: Any) -> CheckpointScope:
    ctx.attention_scope = CheckpointScope()
    return ctx.attention_scope


def _replayed_scope(ctx: Any) -> CheckpointScope:
    scope: CheckpointScope = ctx.attention_scope
    scope.replaying = True
    return scope
