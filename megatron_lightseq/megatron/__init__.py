"""Everything that touches Megatron-Core; only this package and training/ import megatron.

In a program with its own GPTModel::

    from megatron_lightseq.megatron import adopt_layout, gpt_layer_spec, shard_batch

    model = GPTModel(config, gpt_layer_spec(config, context=ContextParallelConfig(cp_method="lightseq")), ...)
    layout = adopt_layout(model)                               # rotary embeddings, and a check of every batch
    ...
    batch = shard_batch(batch, layout, cp_group.rank())        # instead of get_batch_on_this_cp_rank

Names are loaded when first used, because importing Megatron takes seconds.

* :mod:`spec` builds layer specifications around :mod:`core_attention`; :mod:`options` checks Megatron's options,
  :mod:`dense_mask` reads attention masks, :mod:`checkpoint_scope` keeps results across activation recomputation;
* :mod:`batch` cuts batches and makes models follow the layout, with :mod:`rope`, :mod:`multi_token` and
  :mod:`sequence_mixers`; :mod:`packing` and :mod:`packed` say where packed documents end;
* :mod:`sequence_slices` computes MLPs and losses in slices; :mod:`seeded_init` draws initial weights;
* ``fixes/`` holds fixes for Megatron-Core, ``cpu/`` makes it run without CUDA, ``lm/`` serves Megatron-LM.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_lightseq.megatron.batch import adopt_layout, shard_batch
    from megatron_lightseq.megatron.core_attention import (
        CoreAttentionSettings,
        LightSeqCoreAttention,
        prepare_packed,
    )
    from megatron_lightseq.megatron.cpu import platform as cpu_platform
    from megatron_lightseq.megatron.packed import packed_seq_params
    from megatron_lightseq.megatron.packing import Packing
    from megatron_lightseq.megatron.sequence_slices import slice_loss, slice_mlps
    from megatron_lightseq.megatron.spec import gpt_layer_spec, hybrid_block_spec

__all__ = [
    "CoreAttentionSettings",
    "LightSeqCoreAttention",
    "Packing",
    "adopt_layout",
    "cpu_platform",
    "gpt_layer_spec",
    "hybrid_block_spec",
    "packed_seq_params",
    "prepare_packed",
    "shard_batch",
    "slice_loss",
    "slice_mlps",
]

_HOME = {
    "CoreAttentionSettings": "core_attention",
    "LightSeqCoreAttention": "core_attention",
    "Packing": "packing",
    "adopt_layout": "batch",
    "gpt_layer_spec": "spec",
    "hybrid_block_spec": "spec",
    "packed_seq_params": "packed",
    "prepare_packed": "core_attention",
    "shard_batch": "batch",
    "slice_loss": "sequence_slices",
    "slice_mlps": "sequence_slices",
}


def __getattr__(name: str) -> Any:
    if name == "cpu_platform":
        return importlib.import_module(f"{__name__}.cpu.platform")
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
