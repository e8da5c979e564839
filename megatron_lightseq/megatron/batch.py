"""Batches cut by the attention's layout, and the check that both agree.

Megatron's ``get_batch_on_this_cp_rank`` always cuts zigzag. A contiguous attention fed with zigzag data lets
queries see tokens that come after them: no error, and a loss that looks better. So

* :func:`shard_batch` cuts by a layout and leaves the layout's name on every tensor it returns;
* :func:`adopt_layout` makes a model's rotary embeddings follow its attention's layout and has every forward pass
  check what it is given: the name where there is one, the values of ``position_ids`` otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule

from megatron_lightseq.errors import ConfigError, LayoutError, explain
from megatron_lightseq.layout import LAYOUTS, SequenceLayout
from megatron_lightseq.megatron.core_attention import LightSeqCoreAttention
from megatron_lightseq.megatron.fixes.apply import mend_gradients
from megatron_lightseq.megatron.multi_token import adopt_rolls
from megatron_lightseq.megatron.rope import adopt_rotary

SEQUENCE_DIMS: Mapping[str, int] = {
    "tokens": 1,
    "labels": 1,
    "loss_mask": 1,
    "position_ids": 1,
    "attention_mask": 2,
}
"""The sequence dimension of every entry of Megatron's GPT batch; of a mask it is the queries'."""

_TAG = (
    "sequence_layout"  # an attribute of the tensor object: free to carry, lost by any operation on the tensor
)


def shard_batch(
    batch: Mapping[str, torch.Tensor | None], layout: SequenceLayout, rank: int
) -> dict[str, torch.Tensor | None]:
    """This rank's part of a batch that every context-parallel rank holds in full.

    The counterpart of Megatron's ``get_batch_on_this_cp_rank``, which knows zigzag only. Call it last, on the
    tensors that the model gets: a copy to another device afterwards loses the layout's name, and the model then
    has to compare ``position_ids``.

    Args:
        batch: entries of :data:`SEQUENCE_DIMS`, each (B, seq_length) or a mask (B, 1, seq_length, seq_length);
            None entries pass through.
        layout: how the attention expects the sequence to be cut.
        rank: this context-parallel rank.

    Returns:
        The same entries, cut and contiguous.

    Raises:
        ConfigError: an entry whose sequence dimension is not known.
        LayoutError: the sequence does not divide among the ranks.
    """
    shards: dict[str, torch.Tensor | None] = {}
    for name, tensor in batch.items():
        if tensor is None:
            shards[name] = None
            continue
        if name not in SEQUENCE_DIMS:
            raise ConfigError(
                explain(
                    got=f"batch entry {name!r}",
                    rule=f"entries with a known sequence dimension are {', '.join(SEQUENCE_DIMS)}",
                    remedy="Take it out of the batch and cut it with SequenceLayout.shard",
                )
            )
        shard = layout.shard(tensor, rank, SEQUENCE_DIMS[name]).contiguous() if layout.cp_size > 1 else tensor
        setattr(shard, _TAG, layout)
        shards[name] = shard
    return shards


def adopt_layout(model: torch.nn.Module | Iterable[torch.nn.Module]) -> SequenceLayout:
    """Make a model (or the chunks of an interleaved pipeline) follow its attention's layout.

    Call it after building and before the first forward pass; wrapped in Float16Module or DDP or not. Rotary
    embeddings are cut by the layout from then on, multi-token prediction finds the next token by it, and every forward
    pass refuses data of another layout. Without context parallelism none of that changes.

    On the way it mends two gradients that Megatron gets wrong on several ranks:
    :func:`megatron_lightseq.megatron.fixes.apply.mend_gradients`.

    Returns:
        The layout, for :func:`shard_batch`.

    Raises:
        LayoutError: the layers disagree on the layout, or there is no LightSeqCoreAttention.
    """
    chunks = [model] if isinstance(model, torch.nn.Module) else list(model)
    attentions = [m for chunk in chunks for m in chunk.modules() if isinstance(m, LightSeqCoreAttention)]
    layouts = {str(attention.layout): attention.layout for attention in attentions}
    if len(layouts) != 1:
        raise LayoutError(
            explain(
                got=f"a model whose attentions have the layouts {', '.join(layouts) or '(none)'}",
                rule="all layers see the same shards, so they need one layout",
                remedy="Build the model with one gpt_layer_spec",
            )
        )
    layout = next(iter(layouts.values()))
    adopted = all(attention.layout_adopted for attention in attentions)
    if layout.cp_size > 1 and not adopted:
        group = attentions[0].group
        assert group is not None, "cp_size > 1 implies a group"
        rank = group.rank()
        for chunk in chunks:
            adopt_rotary(chunk, layout, rank)
            adopt_rolls(chunk, layout, group)
            for language_model in _language_models(chunk):
                language_model.register_forward_pre_hook(_LayoutCheck(layout, rank), with_kwargs=True)
    for attention in attentions:
        attention.layout_adopted = True
    for chunk in chunks:
        mend_gradients(chunk)
    return layout


def _language_models(chunk: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules whose forward takes the batch."""
    return [module for module in chunk.modules() if isinstance(module, LanguageModule)] or [chunk]


class _LayoutCheck:
    """A forward pre-hook: the arguments of ``GPTModel.forward`` must have been cut by ``layout``."""

    def __init__(self, layout: SequenceLayout, rank: int) -> None:
        self.layout = layout
        self.rank = rank
        self._positions: dict[tuple[int, torch.device], torch.Tensor] = {}

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        given = dict(zip(("input_ids", "position_ids"), args, strict=False), **kwargs)
        tagged = {
            name: getattr(value, _TAG)
            for name, value in [*given.items(), *((str(i), value) for i, value in enumerate(args))]
            if isinstance(value, torch.Tensor) and hasattr(value, _TAG)
        }
        for name, layout in tagged.items():
            if layout != self.layout:
                raise self._disagreement(f"{name} cut by {layout}")
        if given.get("input_ids") is not None and not {"input_ids", "position_ids"} & set(tagged):
            self._check_values(given.get("position_ids"))

    def _check_values(self, position_ids: torch.Tensor | None) -> None:
        """Costs a comparison on the device and a wait for it; data from shard_batch is never checked this way."""
        if position_ids is None:
            raise self._disagreement("a batch without position_ids that shard_batch did not cut")
        seq_length = position_ids.shape[-1] * self.layout.cp_size
        if not bool((position_ids == self._expected(self.layout, seq_length, position_ids.device)).all()):
            raise self._disagreement(f"position_ids cut by {self._recognise(position_ids, seq_length)}")

    def _expected(self, layout: SequenceLayout, seq_length: int, device: torch.device) -> torch.Tensor:
        key = (seq_length, device)
        if layout != self.layout:
            return torch.tensor(layout.positions(self.rank, seq_length), device=device)
        if key not in self._positions:
            self._positions[key] = torch.tensor(layout.positions(self.rank, seq_length), device=device)
        return self._positions[key]

    def _recognise(self, position_ids: torch.Tensor, seq_length: int) -> str:
        for name in LAYOUTS:
            layout = SequenceLayout(name, self.layout.cp_size)
            try:
                expected = self._expected(layout, seq_length, position_ids.device)
            except LayoutError:
                continue
            if bool((position_ids == expected).all()):
                return str(layout)
        return "no layout known here"

    def _disagreement(self, got: str) -> LayoutError:
        return LayoutError(
            explain(
                got=f"{got}, on rank {self.rank} of an attention on {self.layout}",
                rule="data and attention must agree, or queries would silently see future tokens",
                remedy=f"Cut batches with megatron_lightseq.megatron.shard_batch(batch, {self.layout}, rank), or "
                f"choose the cp_layout of the data",
            )
        )
