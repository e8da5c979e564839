"""Exchanges heads for tokens within a group of u ranks, and back (DeepSpeed-Ulysses, arXiv 2309.14509).

Before the exchange a rank holds its own tokens of all heads; after it, the tokens of all u ranks, of about H / u
heads. Nothing has to divide evenly: ranks may differ by one head, and a key/value head goes to every rank that has
one of its query heads, so there may be fewer key/value heads than ranks.

Shape letters: S = local tokens, B = batch, H = query heads, G = key/value heads, D = head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor

from megatron_lightseq.attention.plan import Gradients, Run
from megatron_lightseq.attention.stats import AttentionStats
from megatron_lightseq.kernels.registry import accumulator_dtype
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.schedule.heads import HeadCut
from megatron_lightseq.transport import Transport, all_to_all

HeadRanges = tuple[range, ...]
"""The consecutive heads of each rank."""


class HeadExchange:
    """The exchange and its inverse, for one shape of inputs over one group."""

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
        """The number of query heads that this rank computes."""
        return len(self.cut.heads[self.member])

    def to_heads(self, *parts: tuple[Sequence[Tensor], HeadRanges]) -> list[Tensor]:
        """From local tokens of all heads to all u S tokens of this rank's heads, in one all-to-all.

        Args:
            parts: pairs of tensors, (S, B, heads, D) or (B, heads, S), and of the heads that each rank gets of them.

        Returns:
            All tensors, in the order given.
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
        self._exchange(outgoing, incoming, "heads for tokens")
        return [self._join([received[index] for received in incoming]) for index in range(len(cuts))]

    def to_tokens(self, xs: Sequence[Tensor], cut: HeadRanges, add: bool = False) -> list[Tensor]:
        """The inverse of :meth:`to_heads`. With ``add``, what several ranks hold of one head is summed."""
        parts = [[self._part(x, member) for x in xs] for member in range(len(cut))]
        incoming = [[x.new_empty(_resized(x, _head_dim(x), len(heads))) for x in parts[0]] for heads in cut]
        self._exchange(parts, incoming, "tokens for heads")
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

    def _exchange(self, outgoing: list[list[Tensor]], incoming: list[list[Tensor]], what: str) -> None:
        with nullcontext() if self._stats.trace is None else self._stats.trace.region(what):
            traffic = all_to_all(self._transport, outgoing, incoming, what)
        self._stats.bytes_sent += traffic.sent
        self._stats.bytes_received += traffic.received
        self._stats.exposed_seconds += traffic.seconds

    def _join(self, parts: list[Tensor]) -> Tensor:
        """The tokens of all members, in the storage order of the group's merged shard."""
        dim, length = _token_dim(parts[0]), parts[0].shape[_token_dim(parts[0])]
        whole = parts[0].new_empty(_resized(parts[0], dim, length * len(parts)))
        for member, part in enumerate(parts):
            for there, here in self._layout.landing(self._ranks[member], len(parts), length):
                whole[_at(dim, here)] = part[_at(dim, there)]
        return whole

    def _part(self, whole: Tensor, member: int) -> Tensor:
        """The tokens of one member, in the storage order of its shard."""
        size, dim = self._transport.size, _token_dim(whole)
        length = whole.shape[dim] // size
        part = whole.new_empty(_resized(whole, dim, length))
        for there, here in self._layout.landing(self._ranks[member], size, length):
            part[_at(dim, there)] = whole[_at(dim, here)]
        return part


def expand(x: Tensor, index: list[int] | None) -> Tensor:
    """Key/value heads (S, B, G, D) selected by ``index``, which may repeat them; None leaves them as they are."""
    return x if index is None else x[:, :, index]


def fold(grad: Tensor, index: list[int] | None, num_groups: int) -> Tensor:
    """The gradient of :func:`expand`'s input, from that of its output."""
    if index is None:
        return grad
    folded = grad.new_zeros(_resized(grad, 2, num_groups))
    for head, group in enumerate(index):  # always in this order, so that results repeat bit for bit
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
    """Another run for this rank's share of the heads, between an exchange of heads for tokens and its inverse.

    The backward exchanges its inputs again instead of keeping them in both forms. It therefore needs nothing from the
    forward but its result, which may have been kept across recomputation, and holds no more memory.
    """

    exchange: HeadExchange
    inner: Run

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Exchange, attend with this rank's heads, exchange back. Shapes as in :class:`plan.Run`."""
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
        """The same for gradients. Those of shared key/value heads are added up over the ranks that used them."""
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
        if cut.groups_are_disjoint:  # already final, so half as many bytes can travel
            dk, dv = dk.to(k.dtype), dv.to(v.dtype)
        dk, dv = self.exchange.to_tokens([dk, dv], cut.groups, add=not cut.groups_are_disjoint)
        return dq, dk, dv

    def _expanded(self, keys_and_values: list[Tensor]) -> list[Tensor]:
        """Keys and values, copied for each query head if a kernel could not find them by division."""
        index = self._group_of_head()
        return [expand(x, index) for x in keys_and_values]

    def _group_of_head(self) -> list[int] | None:
        return self.exchange.cut.group_of_head(self.exchange.member)

    def _num_groups(self) -> int:
        return len(self.exchange.cut.groups[self.exchange.member])


@dataclass(frozen=True, slots=True, kw_only=True)
class UlyssesGroups:
    """How a context-parallel group divides into groups of u ranks that exchange heads, and rings of P / u ranks.

    Both are listed as ranks of the context-parallel group. They need no communicators: their transfers go through the
    whole group's, so nothing collective has to happen when a method is chosen.
    """

    ulysses: tuple[int, ...]
    """The ranks with which this rank exchanges heads, in ascending order."""
    ring: tuple[int, ...]
    """The ranks with which this rank runs a schedule; all of them hold the same heads."""

    @staticmethod
    def of(layout: SequenceLayout, ulysses_size: int, rank: int) -> UlyssesGroups:
        """The groups of ``rank``; those that exchange heads hold the shards of :meth:`SequenceLayout.merged`.

        Raises:
            LayoutError: ``ulysses_size`` does not divide the number of ranks, or the layout has no such groups.
        """
        groups = [layout.members(group, ulysses_size) for group in range(layout.merged(ulysses_size).cp_size)]
        mine = next(group for group in groups if rank in group)
        index = mine.index(rank)
        return UlyssesGroups(ulysses=mine, ring=tuple(group[index] for group in groups))
