"""Initial weights of a model with padded heads: those of the original model, and zeros.

A head whose projections are all zero has zero output and zero gradients: the output projection gets no gradient because
the head's output is zero, and the head gets no gradient because the output projection is zero. Adam and weight decay
keep zeros unchanged. The padded model therefore trains exactly like the original, at a higher cost, and losses can be
compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_lightseq.config import ModelConfig
from megatron_lightseq.megatron.seeded_init import Init, WeightNames

_QKV, _PROJECTION = ("weight", 0), ("residual", 0)
"""Attention is built before the MLP, so its matrices are the first ones with their role in each layer."""


@dataclass(slots=True, kw_only=True)
class PaddedWeightNames(WeightNames):
    """Initialises the larger matrices of a model with padded heads with the weights of ``model``."""

    model: ModelConfig
    """The model without padding."""

    def normal(self, role: str, std: float) -> Init:
        """Like :meth:`WeightNames.normal`, with zeros in the padded part of attention's matrices."""
        plain = WeightNames.normal(self, role, std)

        def draw(tensor: torch.Tensor) -> torch.Tensor:
            index = self._drawn[role, self.layer]
            shape = self._shape(role, index)
            if self.layer == 0 or shape is None or shape == tuple(tensor.shape):
                return plain(tensor)
            drawn = plain(torch.empty(shape, dtype=tensor.dtype, device=tensor.device))
            with torch.no_grad():
                tensor.zero_()
                tensor[: shape[0], : shape[1]] = drawn
            return tensor

        return draw

    def _shape(self, role: str, index: int) -> tuple[int, int] | None:
        """Rows and columns of the matrix without padding; None for matrices without heads.

        Megatron orders the rows of the joint projection by query group, so padding comes last.
        """
        heads, groups = self.model.num_attention_heads, self.model.query_groups
        if (role, index) == _QKV:
            return (heads + 2 * groups) * self.model.head_dim, self.model.hidden_size
        if (role, index) == _PROJECTION:
            return self.model.hidden_size, heads * self.model.head_dim
        return None
