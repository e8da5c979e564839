"""Shared by the adapters to external kernels, which compute whole tiles and cannot accumulate into a partial result.

Shape letters: Q query tokens, K key tokens, B batch, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

import torch
from torch import Tensor

from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.kernels.merge import merge_into
from megatron_lightseq.kernels.tile_mask import TileMask


class TileKind(Enum):
    """The kind of mask that a tile has."""

    EMPTY = "empty"
    FULL = "full"
    CAUSAL = "causal"
    """Query i sees keys 0 to i."""
    BAND = "band"
    """Query i sees keys i + band_lo to i + band_hi."""


def tile_kind(mask: TileMask, num_queries: int, num_keys: int, kernel: str) -> TileKind:
    """The kind of mask that a tile of these sizes has.

    Raises:
        UnsupportedError: the mask has key ranges (packed documents), which no adapter supports.
    """
    if mask.band_hi <= -num_queries or mask.band_lo >= num_keys:
        return TileKind.EMPTY
    if mask.key_ranges is not None:
        raise UnsupportedError(
            explain(
                got=f"kernel {kernel!r} for a tile with key_ranges",
                rule="it supports only full, causal and window masks",
                remedy="Choose kernel='auto' for packed documents",
            )
        )
    unbounded = mask.band_lo <= 1 - num_queries
    if unbounded and mask.band_hi >= num_keys - 1:
        return TileKind.FULL
    return TileKind.CAUSAL if unbounded and mask.band_hi == 0 else TileKind.BAND


def store(out: Tensor, lse: Tensor, out_new: Tensor, lse_new: Tensor, *, accumulate: bool) -> None:
    """Store a tile's ``out_new`` (Q, B, H, D) and ``lse_new`` (B, H, Q), or merge them into ``(out, lse)``."""
    if accumulate:
        merge_into(out, lse, out_new.to(out.dtype), lse_new.to(lse.dtype))
    else:
        out.copy_(out_new)
        lse.copy_(lse_new)


def store_empty(out: Tensor, lse: Tensor, *, accumulate: bool) -> None:
    """Store the result of a tile in which no query sees a key; merging it would change nothing."""
    if not accumulate:
        out.zero_()
        lse.fill_(float("-inf"))


def store_gradients(targets: tuple[Tensor, ...], gradients: Iterable[Tensor], *, accumulate: bool) -> None:
    """Store a tile's gradients, or add them to ``targets``."""
    for target, gradient in zip(targets, gradients, strict=True):
        target.add_(gradient) if accumulate else target.copy_(gradient)


def begin_gradients(targets: tuple[Tensor, ...], *, accumulate: bool) -> None:
    """Zero ``targets``, unless gradients are accumulated in them."""
    if not accumulate:
        for target in targets:
            target.zero_()


def output_with_delta(dout: Tensor, delta: Tensor) -> Tensor:
    """A stand-in for ``out`` that reproduces ``delta``: ``(result * dout).sum(-1) == delta``.

    External backward kernels take ``out`` only to recompute delta. A schedule's backward has delta, but not always
    ``out``, which may belong to another rank.

    Args:
        dout: (Q, B, H, D).
        delta: (B, H, Q).

    Returns:
        (Q, B, H, D), in dout's dtype.
    """
    wide = dout.float() if dout.dtype != torch.float64 else dout
    squares_QBH1 = wide.square().sum(-1, keepdim=True)
    delta_QBH1 = delta.permute(2, 0, 1).unsqueeze(-1)
    factor = torch.where(squares_QBH1 > 0, delta_QBH1 / squares_QBH1, 0.0)
    return (wide * factor).to(dout.dtype)
