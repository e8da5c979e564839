"""Checks that all ranks of a group are about to compute the same attention."""

from __future__ import annotations

import hashlib
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
        if self.transport is None:
            return
        digest = hashlib.sha256(text.encode()).digest()
        everyone = self.transport.gather_digests(digest)
        others = [rank for rank, other in enumerate(everyone) if other != digest]
        if others:
            raise TransportError(
                explain(
                    got=f"rank {self.transport.rank} plans {self.setting}, {shown} (plan {digest.hex()[:12]}); "
                    f"rank(s) {others} plan something else",
                    rule="all ranks of a group run one schedule on equally shaped inputs",
                    remedy="Compare method, layout, mask, kernel, shapes, scale and package version of these ranks",
                )
            )
