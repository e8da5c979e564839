"""Trades heads for tokens within a group of u ranks, and back (DeepSpeed-Ulysses, arXiv 2309.14509).

Before: a rank holds its own tokens of all heads. After: the tokens of all u ranks, of about H / u heads. Nothing has
to divide: head counts may differ by one between ranks, and a key/value head goes to every rank that has one of its
query heads, so that there may be fewer key/value heads than ranks.

Shape letters: S = local tokens, B = batch, H = query heads, G = key/value heads, D = head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.runtime import AttentionStats
from megatron_lightseq.schedule.heads import HeadCut
from megatron_lightseq.transport import Transport, all_to_all

HeadRanges = tuple[range, ...]
"""Consecutive heads by rank."""


class HeadExchange:
    """The two trades, for one kind of input over one group."""

    def __init__(
        self, transport: Transport, layout: SequenceLayout, cut: HeadCut, stats: AttentionStats
    ) -> None:
        """``transport`` connects the u ranks; ``layout`` is the one by which their shards were cut."""
        self.cut = cut
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
            for there, here in self._layout.landing(member, len(parts), length):
                whole[_at(dim, here)] = part[_at(dim, there)]
        return whole

    def _part(self, whole: Tensor, member: int) -> Tensor:
        """The tokens of one member, as its shard stores them."""
        size, dim = self._transport.size, _token_dim(whole)
        length = whole.shape[dim] // size
        part = whole.new_empty(_resized(whole, dim, length))
        for there, here in self._layout.landing(member, size, length):
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
