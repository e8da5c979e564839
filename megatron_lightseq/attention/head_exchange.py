"""Trades heads for tokens within a group of u ranks, and back (DeepSpeed-Ulysses, arXiv 2309.14509).

Before: a rank holds its own tokens of all heads. After: the tokens of all u ranks, of about H / u heads. Nothing has
to divide: head counts may differ by one between ranks, and a key/value head goes to every rank that has one of its
query heads, so that there may be fewer key/value heads than ranks.

Shape letters: S = local tokens, B = batch, H = query heads, G = key/value heads, D = head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_lightseq.attention.plan import Gradients, Run
from megatron_lightseq.attention.stats import AttentionStats
from megatron_lightseq.kernels.registry import accumulator_dtype
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.schedule.heads import HeadCut
from megatron_lightseq.transport import Transport, all_to_all

HeadRanges = tuple[range, ...]
"""Consecutive heads by rank."""


class HeadExchange:
    """The two trades, for one kind of input over one group."""

    def __init__(
        self,
        transport: Transport,
        ranks: Sequence[int],
        layout: SequenceLayout,
        cut: HeadCut,
        stats: AttentionStats,
    ) -> None:
        """``transport`` connects the u ``ranks`` of ``layout``, by which their shards were cut."""
        self.cut = cut
        self._ranks = tuple(ranks)
        self._transport = transport
        self._layout = layout
        self._stats = stats

    @property
    def member(self) -> int:
        """This rank's number among the u."""
        return self._transport.rank

    @property
    def num_heads(self) -> int:
        """Query heads that this rank computes."""
        return len(self.cut.heads[self.member])

    def to_heads(self, *parts: tuple[Sequence[Tensor], HeadRanges]) -> list[Tensor]:
        """From local tokens of all heads to all u S tokens of this rank's heads, in one trade.

        Args:
            parts: tensors (S, B, heads, D) or (B, heads, S), and the heads that each rank takes of them.

        Returns:
            The tensors in the order given, flat.
        """
        cuts = [(x, cut) for xs, cut in parts for x in xs]
        outgoing = [
            [x.narrow(_head_dim(x), cut[peer].start, len(cut[peer])) for x, cut in cuts]
            for peer in range(self._transport.size)
        ]
        incoming = [
            [x.new_empty(_resized(x, _head_dim(x), len(cut[self.member]))) for x, cut in cuts]
            for _ in outgoing
        ]
        self._trade(outgoing, incoming, "heads for tokens")
        return [self._join([received[index] for received in incoming]) for index in range(len(cuts))]

    def to_tokens(self, xs: Sequence[Tensor], cut: HeadRanges, add: bool = False) -> list[Tensor]:
        """The inverse of :meth:`to_heads`; with ``add``, what several ranks have of one head is added up."""
        parts = [[self._part(x, member) for x in xs] for member in range(len(cut))]
        incoming = [[x.new_empty(_resized(x, _head_dim(x), len(heads))) for x in parts[0]] for heads in cut]
        self._trade(parts, incoming, "tokens for heads")
        joined = []
        for index, x in enumerate(parts[0]):
            whole = x.new_zeros(_resized(x, _head_dim(x), max(heads.stop for heads in cut)))
            for heads, received in zip(cut, incoming, strict=True):
                target = whole.narrow(_head_dim(x), heads.start, len(heads))
                if add:
                    target += received[index]
                else:
                    target.copy_(received[index])
            joined.append(whole)
        return joined

    def _trade(self, outgoing: list[list[Tensor]], incoming: list[list[Tensor]], what: str) -> None:
        traffic = all_to_all(self._transport, outgoing, incoming, what)
        self._stats.bytes_sent += traffic.sent
        self._stats.bytes_received += traffic.received
        self._stats.exposed_seconds += traffic.seconds

    def _join(self, parts: list[Tensor]) -> Tensor:
        """All members' tokens, in the order in which the group's merged shard stores them."""
        dim, length = _token_dim(parts[0]), parts[0].shape[_token_dim(parts[0])]
        whole = parts[0].new_empty(_resized(parts[0], dim, length * len(parts)))
        for member, part in enumerate(parts):
            for there, here in self._layout.landing(self._ranks[member], len(parts), length):
                whole[_at(dim, here)] = part[_at(dim, there)]
        return whole

    def _part(self, whole: Tensor, member: int) -> Tensor:
        """The tokens of one member, as its shard stores them."""
        size, dim = self._transport.size, _token_dim(whole)
        length = whole.shape[dim] // size
        part = whole.new_empty(_resized(whole, dim, length))
        for there, here in self._layout.landing(self._ranks[member], size, length):
            part[_at(dim, there)] = whole[_at(dim, here)]
        return part


def expand(x: Tensor, index: list[int] | None) -> Tensor:
    """Key/value heads (S, B, G, D) repeated as ``index`` says; None leaves them."""
    return x if index is None else x[:, :, index]


def fold(grad: Tensor, index: list[int] | None, num_groups: int) -> Tensor:
    """The gradient of :func:`expand`'s input, from that of its output."""
    if index is None:
        return grad
    folded = grad.new_zeros(_resized(grad, 2, num_groups))
    for head, group in enumerate(index):  # in this order on every run: same bits
        folded[:, :, group] += grad[:, :, head]
    return folded


def _head_dim(x: Tensor) -> int:
    return 2 if x.dim() == 4 else 1


def _token_dim(x: Tensor) -> int:
    return 0 if x.dim() == 4 else 2


def _at(dim: int, index: slice) -> tuple[slice, ...]:
    return (*(slice(None),) * dim, index)


def _resized(x: Tensor, dim: int, length: int) -> tuple[int, ...]:
    return (*x.shape[:dim], length, *x.shape[dim + 1 :])


@dataclass(frozen=True, slots=True)
class HeadRun:
    """Heads exchanged for tokens, another run for this rank's share of the heads, and the exchange back.

    The backward exchanges its inputs again instead of keeping both forms of them: attention that was kept over
    recomputation then needs nothing of the forward's, and neither holds more memory than the other.
    """

    exchange: HeadExchange
    inner: Run

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Trade, attend with this rank's heads, trade back."""
        cut = self.exchange.cut
        q_merged, *kv = self.exchange.to_heads(([q], cut.heads), ([k, v], cut.groups))
        k_merged, v_merged = self._expanded(kv)
        if self.exchange.num_heads:
            out, lse = self.inner.forward(q_merged, k_merged, v_merged, scale)
        else:  # more ranks than heads
            out = q_merged.new_empty((*q_merged.shape[:3], v.shape[3]))
            lse = q_merged.new_empty(
                (q_merged.shape[1], 0, q_merged.shape[0]), dtype=accumulator_dtype(q.dtype)
            )
        out, lse = self.exchange.to_tokens([out, lse], cut.heads)
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, scale: float
    ) -> Gradients:
        """The same way for gradients; those of shared keys and values are added up over the ranks that used them."""
        cut = self.exchange.cut
        dout_m, q_m, lse_m, delta_m, *kv = self.exchange.to_heads(
            ([dout, q, lse, delta], cut.heads), ([k, v], cut.groups)
        )
        k_m, v_m = self._expanded(kv)
        if self.exchange.num_heads:
            dq, dk, dv = self.inner.backward(dout_m, q_m, k_m, v_m, lse_m, delta_m, scale)
        else:
            dq, dk, dv = (x.to(accumulator_dtype(x.dtype)) for x in (q_m, k_m, v_m))
        (dq,) = self.exchange.to_tokens([dq.to(q.dtype)], cut.heads)
        dk, dv = (fold(grad, self._group_of_head(), self._num_groups()) for grad in (dk, dv))
        if cut.groups_are_disjoint:  # final already, and half as many bytes
            dk, dv = dk.to(k.dtype), dv.to(v.dtype)
        dk, dv = self.exchange.to_tokens([dk, dv], cut.groups, add=not cut.groups_are_disjoint)
        return dq, dk, dv

    def _expanded(self, keys_and_values: list[Tensor]) -> list[Tensor]:
        """With a copy for each query head where a kernel could not find a query head's keys by division."""
        index = self._group_of_head()
        return [expand(x, index) for x in keys_and_values]

    def _group_of_head(self) -> list[int] | None:
        return self.exchange.cut.group_of_head(self.exchange.member)

    def _num_groups(self) -> int:
        return len(self.exchange.cut.groups[self.exchange.member])


@dataclass(frozen=True, slots=True, kw_only=True)
class UlyssesGroups:
    """How a context-parallel group divides into u ranks that exchange heads, and P / u that pass tiles around.

    Ranks of the context-parallel group, in order; no communicator of their own: transfers between them go through
    the group that they belong to, so nothing collective has to happen when a method is chosen.
    """

    ulysses: tuple[int, ...]
    """This rank's group for exchanging heads."""
    ring: tuple[int, ...]
    """This rank's group for schedules; all of its ranks hold the same heads."""

    @staticmethod
    def of(layout: SequenceLayout, ulysses_size: int, rank: int) -> UlyssesGroups:
        """The groups of ``rank``, such that groups hold what :meth:`SequenceLayout.merged` says.

        Raises:
            LayoutError: ``ulysses_size`` does not divide the ranks.
        """
        groups = [layout.members(group, ulysses_size) for group in range(layout.merged(ulysses_size).cp_size)]
        mine = next(group for group in groups if rank in group)
        index = mine.index(rank)
        return UlyssesGroups(ulysses=mine, ring=tuple(group[index] for group in groups))
