"""Hugging Face models with their sequence cut over ranks: ``attn_implementation="lightseq"``.

Only this package imports transformers and accelerate, and only when a name that needs them is used.

* :mod:`batch` turns a batch into one sequence of documents; :mod:`context` cuts it and holds the attention;
  :mod:`attention` is what transformers calls; :mod:`recompute` keeps attention over activation checkpoints;
  :mod:`experts` adds up the load balancing loss of experts.
* :mod:`trainer` is Hugging Face's Trainer, and its subclasses, over a context-parallel group.
* :mod:`supported` refuses models that would be silently wrong; :mod:`seams` refuses libraries that have changed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_lightseq.hf.attention import register
    from megatron_lightseq.hf.context import ContextParallel
    from megatron_lightseq.hf.experts import share_router_loss_in
    from megatron_lightseq.hf.recompute import keep_attention, keep_attention_in
    from megatron_lightseq.hf.trainer import LightSeqTrainerMixin, ParallelismConfig, Trainer

__all__ = [
    "ContextParallel",
    "LightSeqTrainerMixin",
    "ParallelismConfig",
    "Trainer",
    "keep_attention",
    "keep_attention_in",
    "register",
    "share_router_loss_in",
]

_HOME = {
    "ContextParallel": "context",
    "LightSeqTrainerMixin": "trainer",
    "ParallelismConfig": "trainer",
    "Trainer": "trainer",
    "keep_attention": "recompute",
    "keep_attention_in": "recompute",
    "register": "attention",
    "share_router_loss_in": "experts",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
