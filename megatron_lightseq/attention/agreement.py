"""Checks that all ranks of a group are about to compute the same attention."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from megatron_lightseq.errors import TransportError, explain
from megatron_lightseq.transport import Transport


@dataclass(frozen=True, slots=True)
class Agreement:
    """What one rank compares with its group: collective, and free on a single rank."""

    transport: Transport | None
    """The transport of the whole group; None for a single rank."""
    setting: str
    """The attention's settings, for messages: method, layout and mask."""

    def check(self, text: str, shown: str) -> None:
        """Return if ``text`` is the same on every rank; all ranks must call.

        Args:
            text: everything that must be equal. Only its digest travels.
            shown: what of it a message shows.

        Raises:
            TransportError: the ranks differ; the message names those that differ from this one.
        """
        self.start(text, shown)()

    def start(self, text: str, shown: str) -> Callable[[], None]:
        """Begin a check and return without waiting for other ranks; all ranks must call.

        Args:
            text, shown: as for :meth:`check`.

        Returns:
            What to call before ``text`` is relied on: it waits for the other ranks, and raises as :meth:`check` does.
        """
        if self.transport is None:
            return _nothing
        transport, digest = self.transport, hashlib.sha256(text.encode()).digest()
        wait = transport.start_digests(digest)

        def settle() -> None:
            others = [rank for rank, other in enumerate(wait()) if other != digest]
            if others:
                raise self._differs(transport.rank, others, shown, digest)

        return settle

    def _differs(self, rank: int, others: list[int], shown: str, digest: bytes) -> TransportError:
        return TransportError(
            explain(
                got=f"rank {rank} plans {self.setting}, {shown} (plan {digest.hex()[:12]}); "
                f"rank(s) {others} plan something else",
                rule="all ranks of a group run one schedule on equally shaped inputs",
                remedy="Compare method, layout, mask, kernel, shapes, scale and package version of these ranks",
            )
        )


def _nothing() -> None:
    """A single rank agrees with itself."""
