"""Packed micro-batches in a training step: what the model is told of their documents.

Our attention takes the rows of a micro-batch as one packed sequence. Megatron's own attention without Transformer
Engine knows only dense masks: with ``cp_method: megatron``, the baseline of comparisons, it gets one per row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_lightseq.config.choices import MEGATRON
from megatron_lightseq.errors import DataError, explain
from megatron_lightseq.megatron.core_attention import prepare_packed
from megatron_lightseq.megatron.packed import PackedShard, local_positions, packed_seq_params, shard_of
from megatron_lightseq.megatron.packing import Packing
from megatron_lightseq.training.setup import Training
from megatron_lightseq.transport.group import rank_in


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """What a model is told of the documents of a micro-batch; nothing by default."""

    params: Any = None
    """Megatron's PackedSeqParams, for our attention."""
    shard: PackedShard | None = None
    """The same on this rank."""
    hidden: Tensor | None = None
    """(B, 1, S, S) bool, for Megatron's own attention: which keys a query does not see."""

    def joined(self, batch: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        """The rows of packed sequences (B, S) as one, (1, B * S); otherwise as they are."""
        if self.params is None:
            return batch
        return {name: None if tensor is None else tensor.reshape(1, -1) for name, tensor in batch.items()}

    def within(self, loss_mask: Tensor | None) -> Tensor | None:
        """The loss mask (B, local tokens) without the labels that belong to another document than their tokens."""
        if self.shard is None or loss_mask is None:
            return loss_mask
        return loss_mask.masked_fill(self.shard.lasts.to(loss_mask.device), 0)


DOCUMENTS = "documents"
"""The entry of a batch whose documents are known already."""


class PreparedAhead:
    """Micro-batches of packed data, each with its documents; attention to the next one's is planned ahead.

    Plans of the next micro-batch are made when a micro-batch is taken. A forward pass then makes none, and waits for no
    other rank to agree on one.
    """

    def __init__(self, training: Training, batches: Iterator[Mapping[str, Any]]) -> None:
        self._training, self._batches = training, batches
        self._following: Mapping[str, Any] | Exception | None = None
        """Read, but not taken: the next micro-batch, or the error of reading it."""

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return self

    def __next__(self) -> Mapping[str, Any]:
        batch = self._read() if self._following is None else self._following
        if isinstance(batch, Exception):
            raise batch
        self._following = self._read()
        if not isinstance(self._following, Exception):
            self._prepare(self._following[DOCUMENTS])
        return batch

    def _read(self) -> Mapping[str, Any] | Exception:
        """The next micro-batch, or why there is none, which matters only if it is asked for."""
        try:
            batch = next(self._batches)
            return {**batch, DOCUMENTS: documents_of(self._training, batch)}
        except Exception as error:  # noqa: BLE001 - raised when the micro-batch is taken
            return error

    def _prepare(self, documents: Documents) -> None:
        for model in self._training.models:
            prepare_packed(model, documents.params)


def prepared_ahead(training: Training, batches: Iterator[Any]) -> Iterator[Any]:
    """:class:`PreparedAhead` where our attention shares packed data among ranks; otherwise the batches as they are."""
    config = training.config
    shared = config.data.packed and config.context.cp_method != MEGATRON and training.sizes.context > 1
    return PreparedAhead(training, batches) if shared else batches


def documents_of(training: Training, batch: Mapping[str, Any]) -> Documents:
    """The documents of a micro-batch, on this rank.

    Args:
        training: the run.
        batch: whole sequences, or this rank's tokens; ``packing`` is that of all rows, joined.

    Raises:
        DataError: the data is packed, and the batch does not say how.
        ConfigError: the borders are not those of this micro-batch.
    """
    if DOCUMENTS in batch:
        known: Documents = batch[DOCUMENTS]
        return known
    config = training.config
    if not config.data.packed:
        return Documents()
    packing: Packing | None = batch.get("packing")
    if packing is None:
        raise DataError(
            explain(
                got="a batch without packing",
                rule="with reset_attention_mask or sft, every batch says where its documents end",
                remedy="Add packing, a megatron_lightseq.megatron.packing.Packing of all rows",
            )
        )
    rows, length = config.training.micro_batch_size, config.training.seq_length
    packing.check_tokens(rows * length)
    if config.context.cp_method == MEGATRON:
        return Documents(hidden=hidden_keys(packing, rows, length).to(training.device))
    rank, positions = rank_in(training.groups.cp), None
    if not config.data.restarts_positions:
        positions = local_positions(training.layout, rank, packing.tokens) % length
    params = packed_seq_params(packing, training.layout, rank, positions=positions, device=training.device)
    return Documents(params=params, shard=shard_of(params, training.layout, rank))


def hidden_keys(packing: Packing, rows: int, length: int) -> Tensor:
    """(rows, 1, length, length) bool: true where a causal query must not see a key, as in Megatron's dense masks.

    Args:
        packing: the documents of all rows, joined.
        rows: number of rows; a document does not reach from one to the next.
        length: tokens of a row.
    """
    borders = torch.tensor(packing.cu_seqlens)
    document = torch.repeat_interleave(torch.arange(len(borders) - 1), borders.diff()).view(rows, length)
    padding = (packing.positions() >= torch.tensor(packing.lengths)[document.flatten()]).view(rows, length)
    seen = (document.unsqueeze(2) == document.unsqueeze(1)).tril()
    return ~(seen & ~padding.unsqueeze(1)).unsqueeze(1)
