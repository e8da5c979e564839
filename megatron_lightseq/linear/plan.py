"""What one rank does for linear attention over inputs of one kind: made once for each kind, and used by many calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lightseq.attention.runtime import Runtime
from megatron_lightseq.kernels.linear.contract import Documents, LinearKernel, Part
from megatron_lightseq.kernels.registry import accumulator_dtype
from megatron_lightseq.linear.grid import grid_piece, parts_of, pieces_of
from megatron_lightseq.linear.inputs import LinearInputs
from megatron_lightseq.linear.visible import Packing, documents_of
from megatron_lightseq.schedule import Direction
from megatron_lightseq.schedule.scan import Scan


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearPlan:
    """A rank's part of linear attention over inputs of one kind."""

    rank: int
    inputs: LinearInputs
    scale: float
    kernel: LinearKernel
    runtime: Runtime
    """Executes the scans over the group."""
    scans: Mapping[Direction, Scan]
    """How states, and their gradients, go from rank to rank."""
    invariant: bool
    """Whether the maps of pieces travel one by one, so that every scan gives the same bits."""
    documents: Documents | None
    """Of the rank's tokens; None for one document."""
    parts: tuple[tuple[int, int, int], ...]
    """(start, stop, tokens of a piece), as of :func:`.grid.parts_of`."""

    @staticmethod
    def of(
        inputs: LinearInputs,
        *,
        scale: float,
        rank: int,
        packings: Sequence[Packing],
        scans: Mapping[Direction, Scan],
        kernel: LinearKernel,
        runtime: Runtime,
        invariant: bool,
    ) -> LinearPlan:
        """The plan of one rank.

        Args:
            inputs: their facts.
            rank: its number in the group.
            packings: the documents of each row, or of all rows.
            scale, scans, kernel, runtime, invariant: as in the attributes.
        """
        tokens = inputs.q_shape[0]
        seq_length = scans[Direction.FORWARD].seq_length
        positions = range(rank * tokens, (rank + 1) * tokens)
        return LinearPlan(
            rank=rank,
            inputs=inputs,
            scale=scale,
            kernel=kernel,
            runtime=runtime,
            scans=scans,
            invariant=invariant,
            documents=documents_of(packings, positions, inputs.device),
            parts=tuple(parts_of(tokens, grid_piece(seq_length), kernel.longest_part)),
        )

    def maps_of(self, chunks: int) -> int:
        """The maps that the MAP of a run of ranks' chunks is made of."""
        return pieces_of(self.parts) * chunks if self.invariant else 1

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
