"""The seams to Megatron-Core. Only this package and training/ import megatron.

In a program with its own GPTModel::

    from megatron_lightseq.megatron import adopt_layout, gpt_layer_spec, shard_batch

    model = GPTModel(config, gpt_layer_spec(config, context=ContextParallelConfig(cp_method="lightseq")), ...)
    layout = adopt_layout(model)                               # rotary embeddings, and the check of every batch
    ...
    batch = shard_batch(batch, layout, cp_group.rank())        # instead of get_batch_on_this_cp_rank

Names load when first used: importing Megatron takes seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_lightseq.megatron.batch import adopt_layout, shard_batch
    from megatron_lightseq.megatron.core_attention import CoreAttentionSettings, LightSeqCoreAttention
    from megatron_lightseq.megatron.sequence_slices import tile_loss, tile_mlps
    from megatron_lightseq.megatron.spec import gpt_layer_spec

__all__ = [
    "CoreAttentionSettings",
    "LightSeqCoreAttention",
    "adopt_layout",
    "gpt_layer_spec",
    "shard_batch",
    "tile_loss",
    "tile_mlps",
]

_HOME = {
    "CoreAttentionSettings": "core_attention",
    "LightSeqCoreAttention": "core_attention",
    "adopt_layout": "batch",
    "gpt_layer_spec": "spec",
    "shard_batch": "batch",
    "tile_loss": "sequence_slices",
    "tile_mlps": "sequence_slices",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
