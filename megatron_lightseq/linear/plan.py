"""What one rank does for linear attention over inputs of one kind: made once for each kind, and used by many calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lightseq.attention.stats import AttentionStats
from megatron_lightseq.kernels.linear.contract import Documents, LinearKernel, Part
from megatron_lightseq.kernels.registry import accumulator_dtype
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.linear.grid import grid_piece, parts_of
from megatron_lightseq.linear.inputs import LinearInputs
from megatron_lightseq.linear.visible import Packing, documents_of
from megatron_lightseq.transport import Transport


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearPlan:
    """A rank's part of linear attention over inputs of one kind."""

    rank: int
    inputs: LinearInputs
    scale: float
    kernel: LinearKernel
    transport: Transport | None
    """None for a single rank."""
    stats: AttentionStats
    documents: Documents | None
    """Of the rank's tokens; None for one document."""
    parts: tuple[tuple[int, int, int], ...]
    """(start, stop, tokens of a piece), as of :func:`.grid.parts_of`."""
    crossed: tuple[bool, ...]
    """Whether a document goes on behind each border: ``crossed[r]`` before the first token of rank r."""

    @staticmethod
    def of(
        inputs: LinearInputs,
        *,
        scale: float,
        rank: int,
        layout: SequenceLayout,
        packings: Sequence[Packing],
        kernel: LinearKernel,
        transport: Transport | None,
        stats: AttentionStats,
    ) -> LinearPlan:
        """The plan of one rank.

        Args:
            inputs: their facts.
            scale: factor of the output.
            rank: its number in the group.
            layout: contiguous, over the group.
            packings: the documents of each row, or of all rows.
            kernel: computes the parts.
            transport: connects the group.
            stats: where to count.
        """
        tokens, size = inputs.q_shape[0], layout.cp_size
        seq_length = tokens * size
        positions = range(rank * tokens, (rank + 1) * tokens)
        borders = [at * tokens for at in range(size)]
        return LinearPlan(
            rank=rank,
            inputs=inputs,
            scale=scale,
            kernel=kernel,
            transport=transport,
            stats=stats,
            documents=documents_of(packings, positions, inputs.device),
            parts=tuple(parts_of(tokens, grid_piece(seq_length))),
            crossed=tuple(any(packing.start(at) < at for packing in packings) for at in borders),
        )

    def part(self, tensors: Sequence[Tensor | None], start: int, stop: int, piece: int) -> Part:
        """Some tokens of q, k, v, log_decay and beta."""
        return Part.of(
            [None if x is None else x[start:stop] for x in tensors],
            piece=piece,
            scale=self.scale,
            documents=None if self.documents is None else self.documents.part(start, stop),
            heads=self.inputs.heads,
        )

    def zero(self) -> Tensor:
        """A state of zero: (B, H, K, V), accumulator dtype."""
        _, batch, _, key_dim = self.inputs.q_shape
        dtype = self.inputs.dtypes[2]
        assert dtype is not None, "v has a dtype"
        return torch.zeros(
            (batch, self.inputs.heads, key_dim, self.inputs.v_shape[3]),
            dtype=accumulator_dtype(dtype),
            device=self.inputs.device,
        )
