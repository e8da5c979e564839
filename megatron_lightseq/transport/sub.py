"""Some ranks of a group as a group of their own, without a communicator of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_lightseq.transport.base import Message, Pending, Transport


class SubTransport:
    """Renumbers peers. Tags may be those of other traffic of the group, as long as pairs of ranks take turns."""

    def __init__(self, transport: Transport, ranks: Sequence[int]) -> None:
        """``ranks`` are this rank and its peers, by their numbers in ``transport``."""
        self._transport = transport
        self._ranks = tuple(ranks)
        self.rank = self._ranks.index(transport.rank)
        self.size = len(self._ranks)

    def start(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """As in :class:`Transport`, with peers numbered among these ranks."""
        return self._transport.start(
            [self._renumbered(message) for message in sends],
            [self._renumbered(message) for message in receives],
        )

    def _renumbered(self, message: Message) -> Message:
        return replace(message, peer=self._ranks[message.peer])

    def gather_digests(self, digest: bytes) -> list[bytes]:
        """The digests of these ranks; every rank of the whole group must call."""
        everyone = self._transport.gather_digests(digest)
        return [everyone[rank] for rank in self._ranks]
