"""A subset of a group's ranks as a group, without a separate communicator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_lightseq.transport.base import Digests, Message, Pending, Transport


class SubTransport:
    """Renumbers peers. Tags may equal those of other messages of the group, but not while both are in flight."""

    def __init__(self, transport: Transport, ranks: Sequence[int]) -> None:
        """``ranks`` are this rank and its peers, as numbered in ``transport``."""
        self._transport = transport
        self._ranks = tuple(ranks)
        self.rank = self._ranks.index(transport.rank)
        self.size = len(self._ranks)

    def start(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """As in :class:`Transport`, with peers numbered within the subset."""
        return self._transport.start(
            [self._renumbered(message) for message in sends],
            [self._renumbered(message) for message in receives],
        )

    def _renumbered(self, message: Message) -> Message:
        return replace(message, peer=self._ranks[message.peer])

    def gather_digests(self, digest: bytes) -> list[bytes]:
        """As in :class:`Transport`."""
        return self.start_digests(digest)()

    def start_digests(self, digest: bytes) -> Digests:
        """The digests of the subset's ranks; every rank of the whole group must call."""
        wait = self._transport.start_digests(digest)

        def wait_for_subset() -> list[bytes]:
            everyone = wait()
            return [everyone[rank] for rank in self._ranks]

        return wait_for_subset
