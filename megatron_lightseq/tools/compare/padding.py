"""Initial weights of a model with padded heads: the model's own, and zeros.

A head whose projections are zero gives zero, and receives zero gradients: its output is zero, so the output
projection learns nothing there, and that projection is zero, so nothing comes back. Adam and weight decay keep zeros
zero. The padded model therefore trains exactly as the model does, and only costs more; losses can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_lightseq.config import ModelConfig
from megatron_lightseq.megatron.seeded_init import Init, WeightNames

_QKV, _PROJECTION = ("weight", 0), ("residual", 0)
"""Attention is built before the MLP, so its matrices are each layer's first of their role."""


@dataclass(slots=True, kw_only=True)
class PaddedWeightNames(WeightNames):
    """Draws the weights of ``model`` into the larger matrices of the same model with more heads."""

    model: ModelConfig
    """Without padding."""

    def normal(self, role: str, std: float) -> Init:
        """As :meth:`WeightNames.normal`; the padded part of attention's matrices is zero."""
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
        """Rows and columns that the matrix has without padding; None for matrices that have no heads.

        Megatron orders the rows of its joint projection by query group, so padding comes last.
        """
        heads, groups = self.model.num_attention_heads, self.model.query_groups
        if (role, index) == _QKV:
            return (heads + 2 * groups) * self.model.head_dim, self.model.hidden_size
        if (role, index) == _PROJECTION:
            return self.model.hidden_size, heads * self.model.head_dim
        return None
