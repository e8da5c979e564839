"""Cases of the kernel benchmark: shapes, masks, and the number of useful operations.

Shape letters: S = tokens, H = query heads, G = key/value heads, D = head dim.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Literal

import torch

from megatron_lightseq.kernels.tile_mask import TileMask
from megatron_lightseq.mask import Mask

MaskKind = Literal["full", "causal", "window", "documents", "short documents"]
WINDOW = 512
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5
"""Matrix products of (queries, keys, D) per direction: Q K^T and P V; four for the gradients and Q K^T again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelCase:
    """One row of the benchmark; batch size 1, and the same number of keys and queries."""

    mask_kind: MaskKind
    dtype: torch.dtype
    seq_length: int
    head_dim: int
    num_heads: int = 4
    num_kv_heads: int = 4

    def __str__(self) -> str:
        dtype = "bf16" if self.dtype == torch.bfloat16 else "fp32"
        groups = "" if self.num_kv_heads == self.num_heads else f" G={self.num_kv_heads}"
        return f"{self.mask_kind} {dtype} S={self.seq_length} D={self.head_dim} H={self.num_heads}{groups}"

    def mask(self) -> Mask:
        """The mask of the whole sequence."""
        if self.mask_kind == "full":
            return Mask.full()
        if self.mask_kind == "window":
            return Mask.window(WINDOW - 1, 0)
        if self.mask_kind == "causal":
            return Mask.causal()
        return Mask.documents(self.cu_seqlens(), causal=True)

    def tile_mask(self) -> TileMask:
        """The mask as an argument of the kernel."""
        tokens = range(self.seq_length)
        (tile,) = TileMask.of(self.mask(), tokens, tokens, torch.device("cpu"))
        return tile

    def cu_seqlens(self) -> tuple[int, ...]:
        """Starts of the packed documents, then the end: 8 of equal length, or 64 of 16 to 256 tokens."""
        if self.mask_kind == "documents":
            return tuple(range(0, self.seq_length + 1, self.seq_length // 8))
        lengths = short_document_lengths()
        return tuple(sum(lengths[:i]) for i in range(len(lengths) + 1))

    def visible_pairs(self) -> int:
        """Number of (query, key) pairs of one head that the mask allows."""
        mask = self.tile_mask()
        queries = torch.arange(self.seq_length)
        begin = (queries + mask.band_lo).clamp(min=0)
        end = (queries + mask.band_hi + 1).clamp(max=self.seq_length)
        if mask.key_ranges is not None:
            begin = torch.maximum(begin, mask.key_ranges[0])
            end = torch.minimum(end, mask.key_ranges[1])
        return int((end - begin).clamp(min=0).sum())

    def flops(self, direction: Literal["forward", "backward"]) -> int:
        """Useful floating-point operations: two per multiply-add, for visible pairs only."""
        products = FORWARD_PRODUCTS if direction == "forward" else BACKWARD_PRODUCTS
        return 2 * products * self.num_heads * self.head_dim * self.visible_pairs()


def short_document_lengths() -> list[int]:
    """64 lengths of 16 to 256 tokens, from a fixed seed."""
    return random.Random(0).choices(range(16, 257), k=64)


def standard_cases() -> list[KernelCase]:
    """The cases that docs/performance.md reports."""
    cases = []
    for dtype in (torch.float32, torch.bfloat16):
        for head_dim in (64, 128):
            full = KernelCase(mask_kind="full", dtype=dtype, head_dim=head_dim, seq_length=4096)
            causal = replace(full, mask_kind="causal")
            cases += [
                full,
                causal,
                replace(causal, seq_length=1024),
                replace(causal, num_kv_heads=1),
                replace(full, mask_kind="window"),
                replace(full, mask_kind="documents", seq_length=8192),
                replace(full, mask_kind="short documents", seq_length=sum(short_document_lengths())),
            ]
    return cases
