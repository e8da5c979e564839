"""What one rank counts while it computes attention."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class AttentionStats:
    """Running counts of one rank. Bytes and forwards are exact; the exposed time is wall clock of the host."""

    forwards: int = 0
    """Attention forwards that were computed (a reattached one is not)."""
    bytes_sent: int = 0
    bytes_received: int = 0
    exposed_seconds: float = 0.0
    """Time the host spent waiting for transfers after its own kernels. On CUDA streams wait, and this stays 0."""

    def reset(self) -> None:
        """Set every count to zero."""
        self.forwards = self.bytes_sent = self.bytes_received = 0
        self.exposed_seconds = 0.0
