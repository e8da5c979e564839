"""Where a rank is, in memory that outlives it: a killed rank cannot say any more in which exchange it was.

Heartbeats are half a second apart, and a step may have hundreds of exchanges. Each rank therefore writes its place into
an anonymous file in memory, and the rank of the same host that watches it keeps that file mapped. The memory is freed
when the last of the two processes is gone.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass

from megatron_lightseq.schedule import Direction
from megatron_lightseq.training.job.failure import PHASES

_FORM = struct.Struct("<qBBiHH")
_DIRECTIONS = (None, *Direction)
_LARGEST = 0xFFFF


@dataclass(frozen=True, kw_only=True, slots=True)
class Whereabouts:
    """What the main thread of a rank is doing."""

    step: int
    phase: str
    exchange: str = ""
    """Of attention, in words; empty between exchanges."""


def exchange_in_words(direction: Direction | None, step: int, num_steps: int, layer: int) -> str:
    """``forward exchange 1 of 3, layer 2``; empty without a direction. ``step`` counts from 0, layers from 1."""
    if direction is None:
        return ""
    return f"{direction} exchange {step + 1} of {num_steps}" + (f", layer {layer}" if layer else "")


class Board:
    """A rank's own; :meth:`write` costs about a microsecond."""

    def __init__(self) -> None:
        self.path = ""
        """For :class:`BoardView`, on the same host; empty where the system has no such files."""
        self._memory: mmap.mmap | None = None
        try:
            descriptor = os.memfd_create("lightseq-rank")
            os.ftruncate(descriptor, _FORM.size)
            self._memory = mmap.mmap(descriptor, _FORM.size)
            self.path = f"/proc/{os.getpid()}/fd/{descriptor}"
        except (OSError, AttributeError):  # other systems than Linux
            return

    def write(
        self,
        step: int,
        phase: str,
        direction: Direction | None,
        exchange: int,
        num_exchanges: int,
        layer: int,
    ) -> None:
        """Arguments as in :func:`exchange_in_words`, with ``step`` for the optimizer step."""
        if self._memory is not None:
            numbers = PHASES.index(phase), _DIRECTIONS.index(direction), layer
            _FORM.pack_into(
                self._memory, 0, step, *numbers, min(exchange, _LARGEST), min(num_exchanges, _LARGEST)
            )


class BoardView:
    """Another rank's board, readable after its process has ended."""

    def __init__(self, path: str) -> None:
        """Raises OSError or ValueError where it cannot be mapped."""
        with open(path, "rb") as file:
            self._memory = mmap.mmap(file.fileno(), _FORM.size, prot=mmap.PROT_READ)

    def read(self) -> Whereabouts | None:
        """The last entry; None before the first."""
        step, phase, direction, layer, exchange, num_exchanges = _FORM.unpack_from(self._memory, 0)
        if num_exchanges == 0 and step == 0 and phase == 0:
            return None
        if phase >= len(PHASES) or direction >= len(_DIRECTIONS):
            return None
        words = exchange_in_words(_DIRECTIONS[direction], exchange, num_exchanges, layer)
        return Whereabouts(step=step, phase=PHASES[phase], exchange=words)
