"""Adapter to the flash backend of torch's scaled_dot_product_attention.

Needs only torch. The backend computes full and causal tiles and returns lse, so schedules can run on it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.kernels.adapters import (
    TileKind,
    begin_gradients,
    output_with_delta,
    store,
    store_empty,
    store_gradients,
    tile_kind,
)
from megatron_lightseq.kernels.registry import accumulator_dtype, refusal_of
from megatron_lightseq.kernels.specs import KERNELS
from megatron_lightseq.kernels.tile_mask import TileMask


class SdpaKernel:
    """Full tiles of any shape, and causal tiles with as many keys as queries; D = Dv.

    A tile's partial output is rounded to the dtype of the inputs before it is merged; our own kernels merge in fp32.
    """

    spec = KERNELS["sdpa"]
    name = spec.name
    rounds_results = True

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """Why torch's flash backend cannot take these inputs, or None."""
        return refusal_of(self.spec, q, k, v)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        mask: TileMask,
        softmax_scale: float,
        accumulate: bool,
    ) -> None:
        """Merge one tile into ``(out, lse)``, or overwrite them. Shapes as in :class:`~.registry.Kernel`.

        Raises:
            UnsupportedError: the tile is neither full nor causal with as many keys as queries.
        """
        kind = _kind(mask, q, k)
        if kind is TileKind.EMPTY:
            store_empty(out, lse, accumulate=accumulate)
            return
        tile_out, tile_lse = _results(q, k, v, kind is TileKind.CAUSAL, softmax_scale)
        store(out, lse, tile_out.permute(2, 0, 1, 3), tile_lse, accumulate=accumulate)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        delta: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        *,
        mask: TileMask,
        softmax_scale: float,
        accumulate: bool = True,
    ) -> None:
        """Add the tile's gradients to ``dq, dk, dv``, or overwrite them. Shapes as in :class:`~.registry.Kernel`.

        Raises:
            UnsupportedError: the tile is neither full nor causal with as many keys as queries.
        """
        kind = _kind(mask, q, k)
        if kind is TileKind.EMPTY:
            begin_gradients((dq, dk, dv), accumulate=accumulate)
            return
        group = q.shape[2] // k.shape[2]
        tensors = [_by_head(x, 1) for x in (dout, q)] + [_by_head(x, group) for x in (k, v)]
        tensors.append(_by_head(output_with_delta(dout, delta), 1))
        by_head, *shared = _gradients(tensors, _finite(lse), kind is TileKind.CAUSAL, softmax_scale)
        acc = accumulator_dtype(q.dtype)
        folded = (grad.unflatten(1, (-1, group)).sum(2, dtype=acc) for grad in shared)
        grads = (grad.permute(2, 0, 1, 3) for grad in (by_head, *folded))
        store_gradients((dq, dk, dv), grads, accumulate=accumulate)


def _kind(mask: TileMask, q: Tensor, k: Tensor) -> TileKind:
    kind = tile_kind(mask, q.shape[0], k.shape[0], SdpaKernel.name)
    if kind is TileKind.BAND or (kind is TileKind.CAUSAL and q.shape[0] != k.shape[0]):
        raise UnsupportedError(
            explain(
                got=f"kernel 'sdpa' for a tile of {q.shape[0]} queries, {k.shape[0]} keys and the band "
                f"[{mask.band_lo}, {mask.band_hi}]",
                rule="it supports full tiles, and causal tiles with as many keys as queries",
                remedy="Choose kernel='auto' for windows and unequal chunks",
            )
        )
    return kind


def _by_head(x: Tensor, repeat: int) -> Tensor:
    """(S, B, G, D) -> (B, G * repeat, S, D)"""
    return x.permute(1, 2, 0, 3).repeat_interleave(repeat, 1) if repeat > 1 else x.permute(1, 2, 0, 3)


def _finite(lse: Tensor) -> Tensor:
    """lse, with a large value instead of -inf: queries that see no key then get probability 0 instead of exp(inf)."""
    return torch.where(lse.isneginf(), torch.finfo(torch.float32).max, lse)


def _results(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    group = q.shape[2] // k.shape[2]
    tensors = (_by_head(q, 1), _by_head(k, group), _by_head(v, group))
    if q.is_cuda:
        results = torch.ops.aten._scaled_dot_product_flash_attention(
            *tensors, 0.0, causal, False, scale=scale
        )
    else:
        results = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *tensors, 0.0, causal, scale=scale
        )
    return results[0], results[1]


def _gradients(
    tensors: list[Tensor], lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv from dout, q, k, v, out, all (B, H, S, D)."""
    grads: tuple[Tensor, Tensor, Tensor]
    if not lse.is_cuda:
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads = backward(*tensors, lse, 0.0, causal, scale=scale)
        return grads
    num_queries, num_keys = tensors[1].shape[2], tensors[2].shape[2]
    unused = torch.zeros(2, dtype=torch.uint64, device=lse.device)  # random state: there is no dropout
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    grads = backward(
        *tensors, lse, None, None, num_queries, num_keys, 0.0, causal, unused, unused, scale=scale
    )
    return grads
