"""Multi-token prediction over context-parallel ranks: each token's successor is found by the layout of attention.

Megatron shifts ids, positions, labels and loss masks to the left by one token (``roll_tensor``,
transformer/multi_token_prediction.py). Over context-parallel ranks it assumes its own zigzag cut, whatever layout
attention uses. Here the layout says which rank holds the next token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.megatron.bounded_cache import BoundedCache
from megatron_lightseq.megatron.fixes.rebind import rebind

MAX_PLANS = 8
"""Sequence lengths whose exchange of successors is remembered, with at most 16 bytes per local token each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Successors:
    """One rank's part in sending every token to the rank that holds its predecessor."""

    sent: torch.Tensor
    """Local indices of the tokens to send, ordered by receiving rank (int64)."""
    sent_to: list[int]
    """Number of tokens for each rank, this one included."""
    placed: torch.Tensor
    """Local indices of the predecessors of the received tokens, ordered by sending rank (int64)."""
    received_from: list[int]
    """Number of tokens from each rank."""

    @staticmethod
    def of(layout: SequenceLayout, rank: int, seq_length: int, device: torch.device) -> Successors:
        """The plan of ``rank`` for sequences of ``seq_length`` tokens."""
        held = [torch.tensor(layout.positions(other, seq_length)) for other in range(layout.cp_size)]
        owner = torch.empty(seq_length + 1, dtype=torch.int64)
        index = torch.empty(seq_length + 1, dtype=torch.int64)
        owner[seq_length] = -1  # nothing follows the last token
        for other, positions in enumerate(held):
            owner[positions], index[positions] = other, torch.arange(len(positions))
        owners = [owner[positions + 1] for positions in held]
        sent = [index[held[asker] + 1][owners[asker] == rank] for asker in range(layout.cp_size)]
        placed = [torch.nonzero(owners[rank] == other).flatten() for other in range(layout.cp_size)]
        return Successors(
            sent=torch.cat(sent).to(device),
            sent_to=[len(part) for part in sent],
            placed=torch.cat(placed).to(device),
            received_from=[len(part) for part in placed],
        )


class LayoutRoll:
    """Megatron's ``roll_tensor`` for shards of a layout; takes the same arguments.

    Args:
        layout: which rank holds which tokens.
        group: the context-parallel ranks.
    """

    def __init__(self, layout: SequenceLayout, group: dist.ProcessGroup) -> None:
        self.layout = layout
        self.group = group
        self._plans: BoundedCache[tuple[int, torch.device], Successors] = BoundedCache(MAX_PLANS)

    def __call__(
        self,
        tensor: torch.Tensor,
        shifts: int = -1,
        dims: int = -1,
        cp_group: Any = None,
        packed_seq_params: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Every token's successor in the whole sequence, 0 after its last token; collective.

        Args:
            tensor: (B, S), this rank's ids, positions, labels or mask.
            shifts: -1.
            dims: the sequence dimension.
            cp_group: ignored: the group is the model's own.
            packed_seq_params: refused unless None.

        Returns:
            The same shape, and the sum over all ranks divided by their number. Megatron divides a rank's loss by the
            latter, so that ranks with different numbers of unmasked tokens still add up to the mean of one process.

        Raises:
            UnsupportedError: packed sequences, or another shift.
        """
        del cp_group
        if packed_seq_params is not None or shifts != -1:
            raise UnsupportedError(
                explain(
                    got="packed sequences" if packed_seq_params is not None else f"a shift of {shifts}",
                    rule=f"multi-token prediction on layout {self.layout} shifts whole sequences by one token",
                    remedy="Use unpacked sequences, or switch mtp_num_layers off",
                )
            )
        tokens = tensor.movedim(dims, 0)
        seq_length = len(tokens) * self.layout.cp_size
        plan = self._plans.get(
            (seq_length, tensor.device),
            lambda: Successors.of(self.layout, self.group.rank(), seq_length, tensor.device),
        )
        arrived = tokens.new_empty((len(plan.placed), *tokens.shape[1:]))
        dist.all_to_all_single(
            arrived, tokens[plan.sent].contiguous(), plan.received_from, plan.sent_to, group=self.group
        )
        rolled = torch.zeros_like(tokens)
        rolled[plan.placed] = arrived
        rolled = rolled.movedim(0, dims).contiguous()
        total = rolled.sum()
        dist.all_reduce(total, group=self.group)
        return rolled, total / self.layout.cp_size


def adopt_rolls(model: torch.nn.Module, layout: SequenceLayout, group: dist.ProcessGroup) -> int:
    """Make every module below ``model`` that shifts tokens shift them by ``layout``.

    Returns:
        The number of methods that do.
    """
    roll = LayoutRoll(layout, group)
    return sum(rebind(module, "roll_tensor", roll) for module in model.modules())
