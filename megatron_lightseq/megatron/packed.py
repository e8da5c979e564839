"""Megatron's packed batches (``PackedSeqParams``, format thd) on shards of a layout of the whole sequence.

Transformer Engine cuts every document into 2 * CP pieces, which have to be equal, so documents are padded. Here the
whole sequence is cut by the layout of attention, wherever documents end, and three things follow the borders:

* attention gets a mask of documents (:class:`PackedShard`);
* RoPE takes the angle of every local token from its position (:mod:`rope`);
* multi-token prediction finds no successor behind the last token of a document (:mod:`multi_token`).

Attention reads borders on the host. A batch that this package has packed brings them along; those of another program
are read from the device once per micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.megatron.packing import Packing

_SHARD = "lightseq_shard"
"""The attribute of a PackedSeqParams that holds what was worked out for it."""


class PackedShard:
    """What one rank needs to know of the documents of a micro-batch; made once, and shared by all layers.

    Args:
        packing: the documents of the whole sequence.
        layout: which rank holds which tokens.
        rank: this context-parallel rank.
        positions: (tokens,) int64, the whole sequence's positions, or (local tokens,), this rank's; None: they restart
            with every document.
    """

    def __init__(
        self, packing: Packing, layout: SequenceLayout, rank: int, positions: Tensor | None = None
    ) -> None:
        self.packing = packing
        packing.check_tokens(packing.tokens)
        at = local_positions(layout, rank, packing.tokens)
        if positions is None:
            positions = packing.positions(at)
        elif len(positions) == packing.tokens:
            positions = layout.shard(positions, rank, 0)
        self.positions: Tensor = positions.cpu()
        """(local tokens,) int64, on the host."""
        self.lasts: Tensor = packing.lasts(at)
        """(local tokens,) bool, on the host: whether no token of the same document follows."""
        self._masks: dict[tuple[bool, Mask | None], Mask] = {}

    def mask(self, causal: bool, window: Mask | None) -> Mask:
        """The mask of a layer: these documents, and in them what the layer sees."""
        key = causal, window
        if key not in self._masks:
            mask = self.packing.mask & (Mask.causal() if causal else Mask.full())
            self._masks[key] = mask if window is None else mask & window
        return self._masks[key]

    def angles_of(self) -> tuple[list[range], Tensor]:
        """Which angles RoPE needs: ranges of positions, and for each local token an index into all of them."""
        needed, index = self.positions.unique(return_inverse=True)
        edges = [0, *((needed.diff() != 1).nonzero().flatten() + 1).tolist(), len(needed)]
        starts = needed[torch.tensor(edges[:-1])].tolist()
        return [
            range(start, start + end - at) for start, (at, end) in zip(starts, pairwise(edges), strict=True)
        ], index


def local_positions(layout: SequenceLayout, rank: int, tokens: int) -> Tensor:
    """(local tokens,) int64, on the host: the places of a rank's tokens in a sequence of ``tokens`` tokens.

    Raises:
        LayoutError: the tokens do not divide among the ranks.
    """
    layout.check_length(tokens)
    chunks = (layout.chunk_positions(chunk, tokens) for chunk in layout.chunks_of(rank))
    return torch.cat([torch.arange(each.start, each.stop, each.step) for each in chunks])


def packed_seq_params(
    packing: Packing,
    layout: SequenceLayout,
    rank: int,
    *,
    positions: Tensor | None = None,
    device: torch.device | None = None,
) -> PackedSeqParams:
    """Megatron's description of a packed micro-batch, for ``GPTModel.forward(packed_seq_params=...)``.

    Args:
        packing: the documents of the micro-batch.
        layout: what :func:`adopt_layout` returned.
        rank: this context-parallel rank.
        positions: (tokens,) or (B, S) int64, positions for RoPE, or (local tokens,), those of this rank; None: they
            restart with every document.
        device: where Megatron's own tensors are put.

    Returns:
        Megatron's object, to which the borders that attention needs are attached: nothing is read from the device.
    """
    borders = torch.tensor(packing.cu_seqlens, dtype=torch.int32, device=device)
    lengths = torch.tensor((0, *packing.lengths), dtype=torch.int32, device=device).cumsum(
        0, dtype=torch.int32
    )
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=lengths,
        cu_seqlens_kv=lengths,
        cu_seqlens_q_padded=borders,
        cu_seqlens_kv_padded=borders,
        max_seqlen_q=packing.longest,
        max_seqlen_kv=packing.longest,
    )
    flat = None if positions is None else positions.flatten()
    setattr(params, _SHARD, (layout, rank, PackedShard(packing, layout, rank, flat)))
    return params


def shard_of(params: Any, layout: SequenceLayout, rank: int) -> PackedShard:
    """What this rank needs to know of packed sequences.

    Args:
        params: Megatron's PackedSeqParams, of any version.
        layout: which rank holds which tokens.
        rank: this context-parallel rank.

    Raises:
        UnsupportedError: a format or kind of packing that attention does not follow.
        ConfigError: the borders do not start at 0, or decrease, or lengths exceed their documents.
        LayoutError: the tokens do not divide among the ranks.
    """
    known = getattr(params, _SHARD, None)
    if known is not None and known[:2] == (layout, rank):
        shard: PackedShard = known[2]
        return shard
    _check_kind(params)
    shard = PackedShard(_read_packing(params), layout, rank)
    setattr(params, _SHARD, (layout, rank, shard))
    return shard


def _check_kind(params: Any) -> None:
    refused = {
        name: value
        for name, value in (
            ("local_cp_size", getattr(params, "local_cp_size", None)),
            ("cp_group", getattr(params, "cp_group", None)),
        )
        if value is not None
    }
    if refused:
        raise _refused(
            ", ".join(refused),
            "hybrid context parallelism gives every micro-batch ranks of its own, and the tokens here are cut over "
            "the model's one context-parallel group",
            "Switch hybrid_context_parallel off",
        )
    if params.qkv_format != "thd":
        raise _refused(f"qkv_format {params.qkv_format!r}", "packed sequences are in format thd", "Use it")
    if getattr(params, "cp_partition_mode", None) not in (None, "contiguous"):
        raise _refused(
            f"cp_partition_mode {params.cp_partition_mode!r}",
            "it cuts every document, and here the whole sequence is cut by a layout",
            "Cut the batch with megatron_lightseq.megatron.shard_batch, and set cp_partition_mode to contiguous",
        )


def _read_packing(params: Any) -> Packing:
    """The documents, from Megatron's tensors, for which this waits for the device."""
    lengths = _values(params, "cu_seqlens_q", "cu_seqlens_kv")
    borders = _values(params, "cu_seqlens_q_padded", "cu_seqlens_kv_padded") or lengths
    if lengths is None or borders is None or len(lengths) != len(borders):
        raise _refused(
            f"cu_seqlens_q of {len(lengths or ())} borders and cu_seqlens_q_padded of {len(borders or ())}",
            "both name the same documents",
            "Give cu_seqlens_q, and cu_seqlens_q_padded if documents are padded",
        )
    total = getattr(params, "total_tokens", None)
    counted = [end - first for first, end in pairwise(lengths)]
    if total is not None and total > borders[-1]:  # what follows the last document is padding
        borders, counted = [*borders, total], [*counted, 0]
    return Packing(cu_seqlens=tuple(borders), lengths=tuple(counted))


def _values(params: Any, queries: str, keys: str) -> list[int] | None:
    """Borders of queries, which must be those of keys, as numbers."""
    of_queries, of_keys = (getattr(params, name, None) for name in (queries, keys))
    if of_queries is None:
        return None
    found: list[int] = of_queries.tolist()
    if of_keys is not None and of_keys is not of_queries and of_keys.tolist() != found:
        raise _refused(
            f"{queries} and {keys} that differ",
            "queries and keys come from one sequence",
            "Give equal borders",
        )
    return found


def _refused(got: str, rule: str, remedy: str) -> UnsupportedError:
    return UnsupportedError(explain(got=f"packed sequences with {got}", rule=rule, remedy=remedy))


def given_params(signature: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The ``packed_seq_params`` of a call of a module whose ``forward`` has this signature; None if it has none."""
    if "packed_seq_params" in kwargs:
        return kwargs["packed_seq_params"]
    if "packed_seq_params" not in signature.parameters:
        return None
    return signature.bind_partial(*args, **kwargs).arguments.get("packed_seq_params")
