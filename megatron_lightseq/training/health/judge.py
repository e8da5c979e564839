"""What makes a step bad: numbers that are not finite, and losses far above those of the steps before."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable
from enum import IntEnum

WINDOW_STEPS = 32
"""Losses that a spike is compared with."""
FEWEST_STEPS = 16
"""Without so many losses nothing is a spike."""
LEAST_RISE = 1.0
"""Nats per token; a loss that is less than this above the median is no spike, however steady the losses were."""


class Verdict(IntEnum):
    """On one step; of several, the largest counts."""

    GOOD = 0
    SPIKE = 1
    NOT_FINITE = 2


class LossWindow:
    """The losses of the last good steps. It is saved in checkpoints, so that a resumed run judges as it would have."""

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self._losses = deque(losses, maxlen=WINDOW_STEPS)

    def add(self, loss: float) -> None:
        """The loss of a good step."""
        self._losses.append(loss)

    @property
    def losses(self) -> tuple[float, ...]:
        """Oldest first."""
        return tuple(self._losses)

    def is_spike(self, loss: float, factor: float) -> bool:
        """Whether a loss is ``factor`` median absolute deviations, and :data:`LEAST_RISE`, above the median."""
        if len(self._losses) < FEWEST_STEPS:
            return False
        median = statistics.median(self._losses)
        deviation = statistics.median(abs(known - median) for known in self._losses)
        return loss - median > max(factor * deviation, LEAST_RISE)
