"""What attention does with its scores and queries beyond what Megatron's configuration can say."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.mask import Mask


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSettings:
    """Softcap, chunks and temperature tuning, of all layers; the latter two depend on whether a layer has RoPE."""

    softcap: float | None = None
    """c in c * tanh(score / c); None: scores as they are."""
    chunk: int | None = None
    """Tokens of a chunk that attention stays within, in layers with RoPE; None: no chunks."""
    temperature: tuple[float, float] | None = None
    """(scale, tokens over which it stays the same) of temperature tuning, in layers without RoPE; None: none."""

    def restrict(self, mask: Mask, *, has_rope: bool) -> Mask:
        """The mask of a layer, within its chunks."""
        return mask if self.chunk is None or not has_rope else mask & Mask.chunked(self.chunk)

    def check_packed(self) -> None:
        """Raise :class:`UnsupportedError` where positions within packed documents would be needed."""
        if self.chunk is not None or self.temperature is not None:
            raise UnsupportedError(
                explain(
                    got="packed documents with attention_chunk_size or attn_temperature_tuning",
                    rule="chunks and temperatures follow positions in the whole sequence",
                    remedy="Train without packing, or remove these keys",
                )
            )

    def query_scale(self, positions: torch.Tensor, *, has_rope: bool) -> torch.Tensor | None:
        """Factors of queries (S,) at these positions, fp32; None where queries stay as they are."""
        if self.temperature is None or has_rope:
            return None
        scale, tokens = self.temperature
        return 1 + scale * torch.log1p(torch.floor((positions.float() + 1) / tokens))
