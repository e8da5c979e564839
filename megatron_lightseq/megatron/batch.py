"""Batches cut by the layout of attention, and the check that both agree.

Megatron's ``get_batch_on_this_cp_rank`` always cuts zigzag. A contiguous attention that is given zigzag data lets
queries
see later tokens: there is no error, and the loss looks better. Therefore

* :func:`shard_batch` cuts by a layout and attaches the layout to every tensor it returns;
* :func:`adopt_layout` makes a model's rotary embeddings follow the layout of its attention, and every forward pass
  check
  its inputs: the attached layout if there is one, otherwise the values of ``position_ids``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule

from megatron_lightseq.errors import ConfigError, LayoutError, explain
from megatron_lightseq.layout import LAYOUTS, SequenceLayout
from megatron_lightseq.megatron.bounded_cache import BoundedCache
from megatron_lightseq.megatron.fixes.apply import fix_model
from megatron_lightseq.megatron.multi_token import adopt_rolls
from megatron_lightseq.megatron.packed import given_params, shard_of
from megatron_lightseq.megatron.rope import adopt_rotary
from megatron_lightseq.megatron.sequence_layer import SequenceLayer
from megatron_lightseq.megatron.sequence_mixers import check_other_mixers
from megatron_lightseq.transport.group import rank_in

TOKEN_ENTRIES = ("tokens", "labels", "loss_mask", "position_ids", "padding_mask")
"""Entries of Megatron's GPT batch with one value per token, (..., B, seq_length)."""
MASK_ENTRY = "attention_mask"
"""The entry with one value per query and key, (B or 1, 1, seq_length, seq_length); or per token, for padding."""

_LAYOUT_ATTRIBUTE = (
    "sequence_layout"  # on the tensor object: it costs nothing, and any operation on the tensor drops it
)


def shard_batch(
    batch: Mapping[str, torch.Tensor | None], layout: SequenceLayout, rank: int
) -> dict[str, torch.Tensor | None]:
    """This rank's shard of a batch that every context-parallel rank holds in full.

    The counterpart of Megatron's ``get_batch_on_this_cp_rank``, which only cuts zigzag. Call it last, on the tensors
    that
    the model gets: copying them to another device afterwards drops the attached layout, and the model then has to
    compare ``position_ids``.

    Args:
        batch: entries of :data:`TOKEN_ENTRIES`, each (B, seq_length), and :data:`MASK_ENTRY`, (B, seq_length) or
            (B or 1, 1, seq_length, seq_length), which is cut along its queries; None entries are passed on.
        layout: how attention expects the sequence to be cut.
        rank: this context-parallel rank.

    Returns:
        The same entries, cut and contiguous.

    Raises:
        ConfigError: an unknown entry, or one of another shape.
        LayoutError: the sequence does not divide among the ranks, or entries differ in length.
    """
    dims = {name: _sequence_dim(name, tensor) for name, tensor in batch.items() if tensor is not None}
    lengths = {name: batch[name].shape[dim] for name, dim in dims.items()}  # type: ignore[union-attr]
    if len(set(lengths.values())) > 1:
        raise LayoutError(
            explain(
                got=f"a batch with {', '.join(f'{name} of {length} tokens' for name, length in lengths.items())}",
                rule="all entries describe the same sequences",
                remedy="Give every rank the whole sequences, and every entry in full",
            )
        )
    _check_rows(batch)
    shards: dict[str, torch.Tensor | None] = {}
    for name, tensor in batch.items():
        if tensor is None:
            shards[name] = None
            continue
        shard = layout.shard(tensor, rank, dims[name]).contiguous() if layout.cp_size > 1 else tensor
        setattr(shard, _LAYOUT_ATTRIBUTE, layout)
        shards[name] = shard
    return shards


class Shard(NamedTuple):
    """Says of a batch that it was cut when it was read."""

    layout: SequenceLayout
    rank: int


def adopt_shard(
    batch: Mapping[str, torch.Tensor | None], cut: Shard, layout: SequenceLayout, rank: int
) -> dict[str, torch.Tensor | None]:
    """A batch that holds only this rank's tokens, as :func:`shard_batch` returns it.

    Args:
        batch: entries of :data:`TOKEN_ENTRIES`, each (B, local tokens); None entries are passed on.
        cut: what the batch says of itself.
        layout: how attention expects the sequence to be cut.
        rank: this context-parallel rank.

    Raises:
        LayoutError: the batch was cut by another layout, or for another rank.
    """
    if cut != (layout, rank):
        raise LayoutError(
            explain(
                got=f"a batch cut by {cut.layout} for rank {cut.rank}, on rank {rank} of attention on {layout}",
                rule="data and attention must agree, or queries would silently see future tokens",
                remedy="Give the loader the layout of the model and this rank, or whole sequences",
            )
        )
    for tensor in batch.values():
        if tensor is not None:
            setattr(tensor, _LAYOUT_ATTRIBUTE, layout)
    return dict(batch)


def _check_rows(batch: Mapping[str, torch.Tensor | None]) -> None:
    """Raise :class:`ConfigError` if entries hold different numbers of sequences; masks and positions may hold one."""
    rows: dict[str, int] = {}
    for name, tensor in batch.items():
        if tensor is None:
            continue
        count = tensor.shape[0] if name == MASK_ENTRY else tensor.shape[-2]
        if count > 1 or name not in (MASK_ENTRY, "position_ids"):
            rows[name] = count
    if len(set(rows.values())) > 1:
        raise ConfigError(
            explain(
                got=f"a batch with {', '.join(f'{name} of {count} sequences' for name, count in rows.items())}",
                rule=f"all entries hold the same B sequences; {MASK_ENTRY} is (B, seq_length) or "
                "(B or 1, 1, seq_length, seq_length)",
                remedy="Give every entry of the batch in full, and a dense mask with its 4 dimensions",
            )
        )


def _sequence_dim(name: str, tensor: torch.Tensor) -> int:
    """The dimension of a batch entry along which the sequence is cut."""
    shape = tuple(tensor.shape)
    if name in TOKEN_ENTRIES and len(shape) in ((2, 3) if name == "position_ids" else (2,)):
        return len(shape) - 1
    if name == MASK_ENTRY and len(shape) == 2:
        return 1
    if name == MASK_ENTRY and len(shape) == 4 and shape[2] == shape[3]:
        return 2
    known = name in (*TOKEN_ENTRIES, MASK_ENTRY)
    raise ConfigError(
        explain(
            got=f"batch entry {name!r} of shape {shape}",
            rule=f"{', '.join(TOKEN_ENTRIES)} are (B, seq_length), and {MASK_ENTRY} is (B, seq_length) or "
            "(B or 1, 1, seq_length, seq_length)",
            remedy="Give it in this shape"
            if known
            else "Take it out of the batch and cut it with SequenceLayout.shard",
        )
    )


def adopt_layout(
    model: torch.nn.Module | Iterable[torch.nn.Module], *, packed: bool = False
) -> SequenceLayout:
    """Make a model (or the chunks of an interleaved pipeline) follow the layout of its attention.

    Call it after building the model and before its first forward pass, before or after wrapping it in Float16Module or
    DDP. From then on rotary embeddings are cut by the layout, multi-token prediction finds the next token by it, and
    every forward pass refuses data of another layout. Packed sequences (``packed_seq_params``) are understood by all of
    them. Without context parallelism none of this changes anything.

    It also fixes gradients that Megatron computes incorrectly on several ranks:
    :func:`megatron_lightseq.megatron.fixes.apply.fix_model`.

    Args:
        model: the model, or its chunks on this pipeline rank.
        packed: do so without context parallelism too: RoPE then takes its angles from the positions that
            :func:`~megatron_lightseq.megatron.packed.packed_seq_params` was given, and reads nothing from the device.

    Returns:
        The layout, for :func:`shard_batch`.

    Raises:
        LayoutError: the layers have different layouts, or there is no layer of ours.
        UnsupportedError: other layers of the model reorder tokens by Megatron's zigzag, and the layout is another.
    """
    chunks = [model] if isinstance(model, torch.nn.Module) else list(model)
    attentions = [m for chunk in chunks for m in chunk.modules() if isinstance(m, SequenceLayer)]
    layout = _common_layout(attentions)
    for chunk in chunks:
        check_other_mixers(chunk, layout)
    adopted = all(attention.layout_adopted for attention in attentions)
    if (layout.cp_size > 1 or packed) and not adopted:
        group = attentions[0].group
        rank = rank_in(group)
        for chunk in chunks:
            adopt_rotary(chunk, layout, rank)
            adopt_rolls(chunk, layout, group)
            for language_model in _language_models(chunk):
                check = _LayoutCheck(layout, rank, inspect.signature(language_model.forward))
                language_model.register_forward_pre_hook(check, with_kwargs=True)
    for attention in attentions:
        attention.layout_adopted = True
    for chunk in chunks:
        fix_model(chunk)
    return layout


def _common_layout(attentions: list[SequenceLayer]) -> SequenceLayout:
    layouts = {str(attention.layout): attention.layout for attention in attentions}
    if len(layouts) != 1:
        raise LayoutError(
            explain(
                got=f"a model whose attentions have the layouts {', '.join(layouts) or '(none)'}",
                rule="all layers get the same shards, so they need one layout",
                remedy="Build the model with one gpt_layer_spec",
            )
        )
    return next(iter(layouts.values()))


def _language_models(chunk: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules whose ``forward`` takes the batch."""
    return [module for module in chunk.modules() if isinstance(module, LanguageModule)] or [chunk]


_MAX_LENGTHS = 8
"""Sequence lengths whose positions are remembered."""


class _LayoutCheck:
    """A forward pre-hook: checks that the arguments of ``GPTModel.forward`` were cut by ``layout``."""

    def __init__(self, layout: SequenceLayout, rank: int, signature: inspect.Signature) -> None:
        self.layout = layout
        self.rank = rank
        self._signature = signature
        self._positions: BoundedCache[tuple[str, int, torch.device], torch.Tensor] = BoundedCache(
            _MAX_LENGTHS
        )

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        given = dict(zip(("input_ids", "position_ids"), args, strict=False), **kwargs)
        tagged = {
            name: getattr(value, _LAYOUT_ATTRIBUTE)
            for name, value in [*given.items(), *((str(i), value) for i, value in enumerate(args))]
            if isinstance(value, torch.Tensor) and hasattr(value, _LAYOUT_ATTRIBUTE)
        }
        for name, layout in tagged.items():
            if layout != self.layout:
                raise self._disagreement(f"{name} cut by {layout}")
        if given.get("input_ids") is not None and not {"input_ids", "position_ids"} & set(tagged):
            self._check_values(given.get("position_ids"), given_params(self._signature, args, kwargs))

    def _check_values(self, position_ids: torch.Tensor | None, params: Any) -> None:
        """Compare positions, which waits for the device; data from shard_batch never gets here."""
        if position_ids is None:
            raise self._disagreement("a batch without position_ids, which shard_batch did not cut")
        seq_length = position_ids.shape[-1] * self.layout.cp_size
        if params is not None:
            restarted = shard_of(params, self.layout, self.rank).positions
            if restarted.numel() == position_ids.numel() and bool(
                (position_ids.flatten() == restarted.to(position_ids.device)).all()
            ):
                return
        if not bool((position_ids == self._expected(self.layout, seq_length, position_ids.device)).all()):
            raise self._disagreement(f"position_ids cut by {self._recognise(position_ids, seq_length)}")

    def _expected(self, layout: SequenceLayout, seq_length: int, device: torch.device) -> torch.Tensor:
        """The positions of this rank's tokens, if they were cut by a layout."""
        key = (layout.name, seq_length, device)
        return self._positions.get(
            key, lambda: torch.tensor(layout.positions(self.rank, seq_length), device=device)
        )

    def _recognise(self, position_ids: torch.Tensor, seq_length: int) -> str:
        for name in LAYOUTS:
            layout = SequenceLayout(name, self.layout.cp_size)
            try:
                expected = self._expected(layout, seq_length, position_ids.device)
            except LayoutError:
                continue
            if bool((position_ids == expected).all()):
                return str(layout)
        return "no known layout"

    def _disagreement(self, got: str) -> LayoutError:
        return LayoutError(
            explain(
                got=f"{got}, on rank {self.rank} of attention on {self.layout}",
                rule="data and attention must agree, or queries would silently see future tokens",
                remedy=f"Cut batches with megatron_lightseq.megatron.shard_batch(batch, {self.layout}, rank), or "
                f"choose the cp_layout of the data",
            )
        )
