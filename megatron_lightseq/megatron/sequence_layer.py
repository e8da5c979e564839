"""What layers of ours that mix tokens along a cut sequence have in common: a group, and the layout of its shards."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule

from megatron_lightseq.errors import ConfigError, LayoutError, explain
from megatron_lightseq.layout import SequenceLayout


class SequenceLayer(MegatronModule):
    """A layer that reads other tokens of a sequence that is cut over context-parallel ranks.

    :func:`megatron_lightseq.megatron.adopt_layout` finds a model's layers of this kind, and makes all else follow
    their layout.

    Raises:
        ConfigError: the sizes of the context-parallel group and of the configuration differ.
    """

    def __init__(self, config: Any, groups: Any, layout: str) -> None:
        super().__init__(config=config)
        self.group = _context_parallel_group(groups)
        cp_size = 1 if self.group is None else self.group.size()
        if config.context_parallel_size != cp_size:
            raise ConfigError(
                explain(
                    got=f"context_parallel_size {config.context_parallel_size} with a group of {cp_size} ranks",
                    rule="the model's configuration and its context-parallel group must have the same size",
                    remedy="Initialise model parallelism with the configuration's context_parallel_size",
                )
            )
        self.tensor_group = tensor_parallel_group(groups)
        self.layout: SequenceLayout = SequenceLayout(layout, cp_size)
        self.layout_adopted = False
        """Set by :func:`megatron_lightseq.megatron.adopt_layout`: batches and RoPE follow this layout."""

    def check_adopted(self) -> None:
        """Raise :class:`LayoutError` if the sequence is cut and the model was not passed to ``adopt_layout``."""
        if self.layout.cp_size > 1 and not self.layout_adopted:
            raise LayoutError(
                explain(
                    got=f"attention on layout {self.layout} in a model that has not adopted it",
                    rule="batches and rotary embeddings must be cut as attention expects, "
                    "or queries would silently see future tokens",
                    remedy="Call megatron_lightseq.megatron.adopt_layout(model) after building the model, "
                    "and cut batches with shard_batch",
                )
            )


def _context_parallel_group(collection: Any) -> torch.distributed.ProcessGroup | None:
    """The context-parallel group of Megatron's collection, or of its global state if a layer is built without one."""
    group: torch.distributed.ProcessGroup | None = (
        parallel_state.get_context_parallel_group() if collection is None else collection.cp
    )
    return group


def tensor_parallel_group(collection: Any) -> torch.distributed.ProcessGroup | None:
    """The ranks that heads are split over; as above."""
    given: torch.distributed.ProcessGroup | None = None if collection is None else collection.tp
    return parallel_state.get_tensor_model_parallel_group() if given is None else given
