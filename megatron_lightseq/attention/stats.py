"""Counts of one rank's attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_lightseq.attention.trace import Trace
from megatron_lightseq.schedule import Direction


@dataclass(slots=True)
class Place:
    """Where a rank is in its attention, for whoever watches the rank."""

    layer: int = 0
    """Number of the layer, from 1; 0: not known."""
    direction: Direction | None = None
    """Of the exchange that is under way; None between two."""
    step: int = 0
    """Of the schedule, from 0."""
    num_steps: int = 0
    changed: Callable[[], None] | None = None
    """Called after every change."""

    def enter(self, direction: Direction, step: int, num_steps: int) -> None:
        """A step of a schedule begins."""
        self.direction, self.step, self.num_steps = direction, step, num_steps
        if self.changed is not None:
            self.changed()

    def leave(self) -> None:
        """The schedule is done."""
        self.direction = None
        if self.changed is not None:
            self.changed()


@dataclass(slots=True)
class AttentionStats:
    """Running counts of one rank. Forwards and bytes are exact; the exposed time is measured on the host's clock."""

    forwards: int = 0
    """Attention forwards that were computed; reattached results do not count."""
    bytes_sent: int = 0
    bytes_received: int = 0
    exposed_seconds: float = 0.0
    """Seconds that the host waited for transfers after its own kernels; 0 on CUDA, where streams wait instead."""

    place: Place = field(default_factory=Place)
    trace: Trace | None = None
    """Records when everything happens; None: nothing does."""

    def reset(self) -> None:
        """Set every count to zero; the trace stays."""
        self.forwards = self.bytes_sent = self.bytes_received = 0
        self.exposed_seconds = 0.0
