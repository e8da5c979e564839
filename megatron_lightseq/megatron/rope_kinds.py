"""Rotary embeddings that Megatron lacks: LongRoPE, and two bases in one model.

They take the place of the module that Megatron's GPTModel has built, before
:func:`~megatron_lightseq.megatron.adopt_layout`, which makes them follow the layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding


class LongRopeEmbedding(RotaryEmbedding):
    """RoPE with a divisor for each frequency (LongRoPE, arXiv 2402.13753), chosen once for all lengths.

    Args:
        factors: (rotary dimensions / 2,), the divisors.
        options: as of Megatron's RotaryEmbedding.
    """

    def __init__(self, *, factors: Sequence[float], **options: Any) -> None:
        super().__init__(**options)
        plain: torch.Tensor = getattr(self, "inv_freq")  # noqa: B009 - Megatron does not declare it
        self.inv_freq = plain / torch.tensor(factors, device=plain.device)


def long_rope_factor(max_positions: int, original: int) -> float:
    """What LongRoPE multiplies cosines and sines by, so that long contexts keep their entropy.

    Args:
        max_positions: the longest context of the model.
        original: its context before the extension.
    """
    extension = max_positions / original
    return 1.0 if extension <= 1 else math.sqrt(1 + math.log(extension) / math.log(original))


class TwoBaseRotaryEmbedding(RotaryEmbedding):
    """Two rotary embeddings in one tensor (S, 2, 1, D): that of all layers, and that of layers with a window.

    :class:`~megatron_lightseq.megatron.layer.ChoosingSelfAttention` takes the one of its layer.

    Args:
        local_base: base of the second, which is not scaled.
        whole: what Megatron or :class:`LongRopeEmbedding` has made for all layers.
        options: of the second, as of Megatron's RotaryEmbedding.
    """

    def __init__(self, *, local_base: float, whole: RotaryEmbedding, **options: Any) -> None:
        super().__init__(**options, rotary_base=local_base)
        self.whole = whole

    def get_emb(self, max_seq_len: int, offset: int = 0) -> torch.Tensor:
        """Angles of positions ``offset`` to ``offset + max_seq_len``, before any cut."""
        return torch.cat([self.whole.get_emb(max_seq_len, offset), super().get_emb(max_seq_len, offset)], 1)
