"""Adapter to the flash-attn package (FlashAttention-2), if it is installed."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

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
from megatron_lightseq.kernels.registry import refusal_of
from megatron_lightseq.kernels.specs import KERNELS
from megatron_lightseq.kernels.tile_mask import TileMask

INTERFACE = "flash_attn.flash_attn_interface"


@functools.cache
def _probe() -> ModuleType | str:
    """The package's interface, or why it cannot be used; broken installations raise all kinds of errors."""
    try:
        return importlib.import_module(INTERFACE)
    except Exception as error:  # noqa: BLE001
        return f"the flash-attn package cannot be imported here ({type(error).__name__}: {error})"


class FlashAttnKernel:
    """Full, causal and window tiles; grouped heads; D = Dv up to 256, a multiple of 8.

    A tile's partial output is rounded to the dtype of the inputs before it is merged; our own kernels merge in fp32.
    """

    spec = KERNELS["flash_attn"]
    name = spec.name
    rounds_results = True

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """Why flash-attn cannot take these inputs, or None."""
        reason = refusal_of(self.spec, q, k, v)
        if reason is not None:
            return reason
        interface = _probe()
        return interface if isinstance(interface, str) else None

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
            UnsupportedError: flash-attn does not support the tile's mask, or is not installed.
        """
        window = _window(mask, q, k)
        if window is None:
            store_empty(out, lse, accumulate=accumulate)
            return
        tile_out, tile_lse, *_ = _interface()._flash_attn_forward(
            *(x.transpose(0, 1) for x in (q, k, v)),
            dropout_p=0.0,
            softmax_scale=softmax_scale,
            causal=False,
            window_size_left=window[0],
            window_size_right=window[1],
            softcap=0.0,
            alibi_slopes=None,
            return_softmax=False,
        )
        # flash-attn returns lse = +inf for queries that see no key.
        tile_lse = torch.where(tile_lse.isposinf(), float("-inf"), tile_lse)
        store(out, lse, tile_out.transpose(0, 1), tile_lse, accumulate=accumulate)

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
            UnsupportedError: flash-attn does not support the tile's mask, or is not installed.
        """
        window = _window(mask, q, k)
        if window is None:
            begin_gradients((dq, dk, dv), accumulate=accumulate)
            return
        by_batch = [x.transpose(0, 1).contiguous() for x in (dout, q, k, v, output_with_delta(dout, delta))]
        grads = [torch.empty_like(x) for x in by_batch[1:4]]
        _interface()._flash_attn_backward(
            *by_batch,
            torch.where(lse.isneginf(), float("inf"), lse).contiguous(),
            *grads,
            dropout_p=0.0,
            softmax_scale=softmax_scale,
            causal=False,
            window_size_left=window[0],
            window_size_right=window[1],
            softcap=0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        store_gradients((dq, dk, dv), (grad.transpose(0, 1) for grad in grads), accumulate=accumulate)


def _interface() -> ModuleType:
    interface = _probe()
    if isinstance(interface, str):
        raise UnsupportedError(
            explain(
                got="kernel 'flash_attn'", rule=interface, remedy="Install flash-attn or choose kernel='auto'"
            )
        )
    return interface


def _window(mask: TileMask, q: Tensor, k: Tensor) -> tuple[int, int] | None:
    """flash-attn's window: query i sees keys i + Sk - Sq - left to i + Sk - Sq + right; -1 means unbounded."""
    num_queries, num_keys = q.shape[0], k.shape[0]
    kind = tile_kind(mask, num_queries, num_keys, FlashAttnKernel.name)
    if kind is TileKind.EMPTY:
        return None
    diagonal = num_keys - num_queries
    left = -1 if mask.band_lo <= 1 - num_queries else diagonal - mask.band_lo
    right = -1 if mask.band_hi >= num_keys - 1 else mask.band_hi - diagonal
    if (
        left < -1
        or right < -1
        or (left == -1 and mask.band_lo > 1 - num_queries)
        or (right == -1 and mask.band_hi < num_keys - 1)
    ):
        raise UnsupportedError(
            explain(
                got=f"kernel 'flash_attn' for {num_queries} queries, {num_keys} keys and the band "
                f"[{mask.band_lo}, {mask.band_hi}]",
                rule="its windows must contain the diagonal that ends at the last query and key",
                remedy="Choose kernel='auto' for this mask",
            )
        )
    return left, right
