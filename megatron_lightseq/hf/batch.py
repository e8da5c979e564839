"""From a batch of rows to what is cut over the ranks, on every rank alike and without communication.

Shape letters: B = rows of the batch, N = tokens of a row, T = tokens of the sequence that is cut, rows kept apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_lightseq.errors import ConfigError, UnsupportedError, explain
from megatron_lightseq.mask import Mask

IGNORE_INDEX = -100
"""The label of a token that nothing is to be predicted for, as in every loss of transformers."""

SEQUENCES = ("input_ids", "inputs_embeds", "position_ids", "shift_labels")
"""Tensors with one entry for each token, (B, N) or (B, N, E), which are cut."""

_TOKENS = ("input_ids", "inputs_embeds")
_READ = {
    *SEQUENCES,
    "attention_mask",
    "labels",
    "token_type_ids",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "seq_idx",
    "use_cache",
}
_REFUSED = {
    "past_key_values": "a cache holds other tokens than a shard",
    "cache": "a cache holds other tokens than a shard",
    "logits_to_keep": "the last tokens of a shard are not those of the sequence",
    "num_logits_to_keep": "the last tokens of a shard are not those of the sequence",
}


@dataclass(frozen=True, slots=True)
class Sequences:
    """A batch as it is cut: either its rows, or one sequence of documents, T tokens each."""

    fields: dict[str, Tensor]
    """By name in ``SEQUENCES``: (B, T) for rows, (1, T) for one sequence; without labels no ``shift_labels``."""
    others: dict[str, Any]
    """Keyword arguments of the model that are not about tokens."""
    shape: tuple[int, int]
    """(B, N) of the batch."""
    kept: Tensor | None
    """(B * N,) booleans, the tokens of the batch that the one sequence consists of; None where rows stay rows."""
    documents: tuple[int, ...] | None
    """Borders of the documents of the one sequence; None where rows stay rows."""
    tokens: int
    """Of each row or of the one sequence, those before the tokens that only complete the length."""
    row_starts: tuple[int, ...]
    """Where the rows of the batch begin in the one sequence; (0,) where rows stay rows."""

    @property
    def length(self) -> int:
        """T."""
        return self.fields["position_ids"].shape[1]

    @property
    def num_targets(self) -> int:
        """Tokens of the whole batch that something is to be predicted for."""
        return int((self.fields["shift_labels"] != IGNORE_INDEX).sum())

    def mask(self, window: int | None = None, chunk: int | None = None) -> Mask:
        """What attention may see.

        Args:
            window: tokens that a query sees, itself among them; None for all.
            chunk: a query sees its own chunk of this many tokens of its row, as in Llama 4; None for no chunks.
        """
        if self.documents is None:
            mask = Mask.causal() if chunk is None else Mask.chunked(chunk)
        else:
            borders = set(self.documents)
            for start, end in zip(self.row_starts, [*self.row_starts[1:], self.length], strict=True):
                borders.update(range(start, end, chunk) if chunk is not None else ())
            mask = Mask.documents(sorted(borders))
        return mask if window is None else mask & Mask.window(window - 1)


def read(batch: Mapping[str, Any], multiple_of: int) -> Sequences:
    """What is cut of a batch.

    Plain rows stay rows. Rows that hold padding or several documents become one sequence in which every document
    is one, and padding is dropped. Labels are shifted within their rows, before anything is cut.

    Args:
        batch: keyword arguments of a causal language model, the same on every rank: ``input_ids`` (B, N) or
            ``inputs_embeds`` (B, N, E); and, where there are any, ``labels`` or ``shift_labels``, ``attention_mask``
            and ``position_ids`` (B, N), ``cu_seq_lens_q`` (documents + 1,) for one row, ``seq_idx`` (B, N).
        multiple_of: T is a multiple of it. Tokens that are added at the end have no labels and are seen by no other.

    Raises:
        ConfigError: tensors do not fit together.
        UnsupportedError: something that cannot be cut.
    """
    given = {name: value for name, value in batch.items() if value is not None}
    _refuse_unknown(given)
    tokens = _tokens(given)
    positions = _positions(given, tokens)
    keep = _keep(given, tokens)
    starts = _document_starts(given, positions, keep)
    fields: dict[str, Tensor] = {name: given[name] for name in _TOKENS if name in given}
    fields["position_ids"] = positions
    labels = _shifted_labels(given, tokens, keep)
    if labels is not None:
        fields["shift_labels"] = labels
    others = {name: value for name, value in given.items() if name not in _READ}
    rows = Sequences(fields, others, (tokens.shape[0], tokens.shape[1]), None, None, tokens.shape[1], (0,))
    padded = keep is not None and not bool(keep.all())
    if padded or bool(starts[:, 1:].any()):
        rows = _joined(rows, starts, keep)
    return _lengthened(rows, multiple_of)


def _refuse_unknown(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name in _REFUSED and not (isinstance(value, int) and value == 0):
            raise UnsupportedError(
                explain(
                    got=f"{name} in a batch", rule=_REFUSED[name], remedy=f"Leave {name} out of the batch"
                )
            )
        if name not in _READ and isinstance(value, Tensor) and value.dim() > 0:
            raise UnsupportedError(
                explain(
                    got=f"{name} {tuple(value.shape)} in a batch",
                    rule=f"of tensors, only {', '.join(sorted(_READ))} are known, and an unknown one cannot be cut",
                    remedy=f"Take {name} out of the batch, or train this model without context parallelism",
                )
            )
    types = given.get("token_type_ids")
    if types is not None and bool((types != types.flatten()[0]).any()):
        raise UnsupportedError(
            explain(
                got=f"token_type_ids of several types, {tuple(types.shape)}",
                rule="only text of one type is cut",
                remedy="Take token_type_ids out of the batch, or train without context parallelism",
            )
        )


def _tokens(given: Mapping[str, Any]) -> Tensor:
    """What gives the batch its shape."""
    found = [given[name] for name in _TOKENS if name in given]
    if len(found) != 1 or found[0].dim() != (2 if "input_ids" in given else 3):
        raise ConfigError(
            explain(
                got=", ".join(
                    f"{name} {tuple(x.shape)}" for name, x in given.items() if isinstance(x, Tensor)
                ),
                rule="a batch has either input_ids (B, N) or inputs_embeds (B, N, E)",
                remedy="Give one of them",
            )
        )
    tokens: Tensor = found[0]
    for name in ("labels", "shift_labels", "seq_idx"):
        if name in given:
            _check_shape(name, given[name], tokens)
    return tokens


def _check_shape(name: str, x: Tensor, tokens: Tensor) -> None:
    if tuple(x.shape) != tuple(tokens.shape[:2]):
        raise ConfigError(
            explain(
                got=f"{name} {tuple(x.shape)} with tokens {tuple(tokens.shape[:2])}",
                rule="it has one entry for each token, (B, N)",
                remedy="Build the batch with one collator",
            )
        )


def _positions(given: Mapping[str, Any], tokens: Tensor) -> Tensor:
    """Positions in the documents, (B, N); those that models count for themselves where none are given."""
    positions = given.get("position_ids")
    rows, length = tokens.shape[:2]
    if positions is None:
        return torch.arange(length, device=tokens.device).expand(rows, length)
    if positions.dim() != 2 or positions.shape[0] not in (1, rows) or positions.shape[1] != length:
        raise UnsupportedError(
            explain(
                got=f"position_ids {tuple(positions.shape)} with tokens {(rows, length)}",
                rule="positions count the tokens of text, (B, N) or (1, N)",
                remedy="Give positions of that shape; models with several kinds of positions are not supported",
            )
        )
    return positions.expand(rows, length)


def _keep(given: Mapping[str, Any], tokens: Tensor) -> Tensor | None:
    """Which tokens are not padding, (B, N); numbers other than 0 and 1 number the documents of a row."""
    keep = given.get("attention_mask")
    if keep is None:
        return None
    if not isinstance(keep, Tensor) or keep.dim() != 2:
        raise UnsupportedError(
            explain(
                got=f"an attention_mask {tuple(keep.shape) if isinstance(keep, Tensor) else type(keep).__name__}",
                rule="a mask says which tokens of a row are padding, (B, N)",
                remedy="Give position_ids that restart at every document instead of a mask of pairs",
            )
        )
    _check_shape("attention_mask", keep, tokens)
    return keep


def _document_starts(given: Mapping[str, Any], positions: Tensor, keep: Tensor | None) -> Tensor:
    """(B, N) booleans: where a document begins. All that a batch says about documents is believed."""
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    if keep is not None:
        starts[:, 1:] |= keep[:, 1:] != keep[:, :-1]
    if "seq_idx" in given:
        starts[:, 1:] |= given["seq_idx"][:, 1:] != given["seq_idx"][:, :-1]
    borders = given.get("cu_seq_lens_q")
    if borders is not None:
        rows, length = positions.shape
        if rows != 1 or int(borders[-1]) > length:
            raise ConfigError(
                explain(
                    got=f"cu_seq_lens_q up to {int(borders[-1])} with {rows} rows of {length} tokens",
                    rule="it has the borders of the documents of one row",
                    remedy="Give one row, or position_ids that restart at every document",
                )
            )
        inside = borders[(borders > 0) & (borders < length)].long()
        starts[0, inside] = True
    return starts


def _shifted_labels(given: Mapping[str, Any], tokens: Tensor, keep: Tensor | None) -> Tensor | None:
    """(B, N): what is to be predicted at each token; nothing at padding, which is dropped."""
    if "shift_labels" in given:
        shifted: Tensor = given["shift_labels"]
    elif "labels" in given:
        shifted = pad(given["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
    else:
        return None
    return shifted if keep is None else shifted.masked_fill(keep == 0, IGNORE_INDEX)


def _joined(rows: Sequences, starts: Tensor, keep: Tensor | None) -> Sequences:
    """Rows one after the other, (1, T), without padding."""
    kept = torch.ones_like(starts) if keep is None else keep != 0
    of_row = kept.sum(1).cumsum(0).tolist()
    flat = kept.flatten()
    fields = {name: x.flatten(0, 1)[flat].unsqueeze(0) for name, x in rows.fields.items()}
    length = of_row[-1]
    borders = starts.flatten()[flat].nonzero().flatten().tolist()
    return replace(
        rows,
        fields=fields,
        kept=flat,
        documents=tuple(sorted({0, *borders, length})),
        tokens=length,
        row_starts=(0, *of_row[:-1]),
    )


def _lengthened(sequences: Sequences, multiple_of: int) -> Sequences:
    """With tokens at the end that complete the length, as a document of their own where there are documents."""
    length = sequences.length
    missing = max(1, math.ceil(length / multiple_of)) * multiple_of - length
    if not missing:
        return sequences
    fields = {}
    for name, x in sequences.fields.items():
        filler = x.new_full(
            (x.shape[0], missing, *x.shape[2:]), IGNORE_INDEX if name == "shift_labels" else 0
        )
        if name == "position_ids":
            filler += torch.arange(missing, device=x.device)
        fields[name] = torch.cat([x, filler], 1)
    documents = sequences.documents
    if documents is not None:
        documents = tuple(sorted({*documents, length + missing}))
    return replace(sequences, fields=fields, documents=documents)
