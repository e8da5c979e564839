"""Ctrl-C and SIGTERM: finish the step, save, and exit with status 0. A second signal exits immediately."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""SIGUSR1 is what Slurm sends before a time limit (``--signal=USR1@120``)."""


class StopRequest:
    """Whether this process has been asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.leaving = False

    def __bool__(self) -> bool:
        return self.signal is not None

    def leave(self) -> None:
        """From here on signals are ignored, because the process is about to end by itself.

        torchrun sends SIGTERM to all ranks as soon as one has failed; a rank that is reporting a failure elsewhere
        would otherwise be listed as killed.
        """
        self.leaving = True
        for number in HANDLED:
            signal.signal(number, signal.SIG_IGN)  # unlike a handler in Python, this outlasts the interpreter

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None:
            # No clean-up: a save that is running uses a temporary folder, so the old checkpoint stays intact.
            os._exit(128 + number)
        self.signal = signal.Signals(number)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Inside the block, turn the signals in :data:`HANDLED` into a request (main thread only).

    After :meth:`StopRequest.leave` they stay ignored until the process ends.
    """
    request = StopRequest()
    previous = {number: signal.signal(number, request._receive) for number in HANDLED}
    try:
        yield request
    finally:
        if not request.leaving:
            for number, handler in previous.items():
                signal.signal(number, handler)
