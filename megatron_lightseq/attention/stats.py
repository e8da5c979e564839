"""Counts of one rank's attention."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class AttentionStats:
    """Running counts of one rank. Forwards and bytes are exact; the exposed time is measured on the host's clock."""

    forwards: int = 0
    """Attention forwards that were computed; reattached results do not count."""
    bytes_sent: int = 0
    bytes_received: int = 0
    exposed_seconds: float = 0.0
    """Seconds that the host waited for transfers after its own kernels; 0 on CUDA, where streams wait instead."""

    def reset(self) -> None:
        """Set every count to zero."""
        self.forwards = self.bytes_sent = self.bytes_received = 0
        self.exposed_seconds = 0.0
