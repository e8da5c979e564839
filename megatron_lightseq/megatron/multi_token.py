"""Multi-token prediction over context-parallel ranks: each token's successor is found by the layout of attention.

Megatron shifts ids, positions, labels and loss masks to the left by one token (``roll_tensor``,
transformer/multi_token_prediction.py). Over context-parallel ranks it assumes its own zigzag cut, whatever layout
attention uses, and packed documents one by one. Here the layout says which rank holds the next token, all tokens travel
at once, and behind the last token of a document there is none.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer import multi_token_prediction

from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.megatron.bounded_cache import BoundedCache
from megatron_lightseq.megatron.fixes.rebind import rebind, with_globals
from megatron_lightseq.megatron.packed import shard_of
from megatron_lightseq.transport.group import rank_in

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
        group: the context-parallel ranks; None for one.
    """

    def __init__(self, layout: SequenceLayout, group: dist.ProcessGroup | None) -> None:
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
        *,
        whole: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Every token's successor in its sequence or document, 0 after the last token; collective.

        Args:
            tensor: (B, S), this rank's ids, positions, labels or mask.
            shifts: -1.
            dims: the sequence dimension.
            cp_group: ignored: the group is the model's own.
            packed_seq_params: Megatron's, for packed sequences: (1, tokens).
            whole: return the sum over all ranks itself.

        Returns:
            The same shape, and the sum over all ranks divided by their number, at least a count of one. Megatron
            divides a rank's loss by it, so that ranks with different numbers of unmasked tokens still add up to the
            mean of one process, and a micro-batch without any adds nothing.

        Raises:
            UnsupportedError: another shift, or packed sequences of an unknown kind.
        """
        del cp_group
        if shifts != -1:
            raise UnsupportedError(
                explain(
                    got=f"a shift of {shifts}",
                    rule=f"multi-token prediction on layout {self.layout} shifts sequences by one token",
                    remedy="Shift by -1, several times if need be",
                )
            )
        rolled = self._successors(tensor.movedim(dims, 0)).movedim(0, dims).contiguous()
        if packed_seq_params is not None:
            lasts = shard_of(packed_seq_params, self.layout, rank_in(self.group)).lasts
            rolled.movedim(dims, -1).masked_fill_(lasts.to(rolled.device), 0)
        total = rolled.sum()
        if self.group is not None:
            dist.all_reduce(total, group=self.group)
        total = torch.where(total == 0, torch.ones_like(total), total)
        return rolled, total if whole else total / self.layout.cp_size

    def _successors(self, tokens: torch.Tensor) -> torch.Tensor:
        """(S, B) of this rank to (S, B): each token's successor in the whole sequence, 0 behind its end."""
        rolled = torch.zeros_like(tokens)
        if self.group is None or self.layout.cp_size == 1:
            rolled[:-1] = tokens[1:]
            return rolled
        seq_length = len(tokens) * self.layout.cp_size
        plan = self._plans.get(
            (seq_length, tokens.device),
            lambda: Successors.of(self.layout, rank_in(self.group), seq_length, tokens.device),
        )
        arrived = tokens.new_empty((len(plan.placed), *tokens.shape[1:]))
        dist.all_to_all_single(
            arrived, tokens[plan.sent].contiguous(), plan.received_from, plan.sent_to, group=self.group
        )
        rolled[plan.placed] = arrived
        return rolled


class LayoutLoss:
    """Megatron's ``process_mtp_loss`` (from 0.18 on) for shards of a layout; takes the same arguments.

    Tokens are shifted by the layout. Megatron divides losses by a rank's number of shifted tokens, or by 1 if that is
    less, and with ``calculate_per_token_loss`` multiplies them by its number of tokens. Here both are numbers of all
    ranks together. A rank's share of them would not do: it is less than 1 where many ranks have few tokens.
    """

    def __init__(self, original: FunctionType, roll: LayoutRoll) -> None:
        self._original = original
        self._signature = inspect.signature(original)
        self._roll = roll

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Hidden states (S, B, H) of the model's own layers, with the losses of further tokens attached."""
        call = self._signature.bind(*args, **kwargs)
        size = self._roll.layout.cp_size
        given, weight = call.arguments, torch.full((), float(size))
        mask = given.get("loss_mask")
        if given["config"].calculate_per_token_loss and mask is not None:
            given["config"] = copy.copy(given["config"])
            given["config"].calculate_per_token_loss = False
            weight = mask.sum()
            if self._roll.group is not None:
                dist.all_reduce(weight, group=self._roll.group)
        scope = self._original.__globals__
        own = with_globals(
            self._original,
            roll_tensor=partial(self._roll, whole=True),
            MTPLossAutoScaler=_Weighted(scope["MTPLossAutoScaler"], weight),
            MTPLossLoggingHelper=_LoggedAsMean(scope["MTPLossLoggingHelper"], size),
        )
        hidden: torch.Tensor = own(*call.args, **call.kwargs)
        return hidden


@dataclass(frozen=True, slots=True)
class _Weighted:
    """An autograd function that attaches a loss to an activation, with a weight for the loss."""

    function: Any
    weight: torch.Tensor

    def apply(self, activation: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        attached: torch.Tensor = self.function.apply(activation, loss * self.weight)
        return attached


@dataclass(frozen=True, slots=True)
class _LoggedAsMean:
    """Megatron's log of these losses, for parts of a mean over all ranks: it averages what the ranks log."""

    helper: Any
    factor: int

    def __getattr__(self, name: str) -> Any:
        logged = getattr(self.helper, name)
        if not name.startswith("save_"):
            return logged

        def save(loss: torch.Tensor, *args: Any, **options: Any) -> None:
            logged(loss * self.factor, *args, **options)

        return save


def adopt_rolls(model: torch.nn.Module, layout: SequenceLayout, group: dist.ProcessGroup | None) -> int:
    """Make every module below ``model`` that shifts tokens shift them by ``layout``.

    Returns:
        The number of methods that shift tokens.
    """
    roll = LayoutRoll(layout, group)
    loss = getattr(multi_token_prediction, "process_mtp_loss", None)  # until 0.17 a part of a method
    found = 0
    for module in model.modules():
        found += rebind(module, "roll_tensor", roll)
        if loss is not None:
            found += rebind(module, "process_mtp_loss", LayoutLoss(loss, roll))
    return found
