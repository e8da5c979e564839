"""Ctrl-C, SIGTERM, SIGHUP and SIGUSR1: finish the step, save, and exit with status 0.

A second Ctrl-C, SIGTERM or SIGHUP exits immediately.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""SIGUSR1 is what Slurm sends before a time limit (``--signal=USR1@120``), SIGHUP what a closed terminal sends."""
_ONE_REQUEST_S = 1.0
"""Signals that are closer together are one request: a scheduler may signal a rank, and so does its launcher."""


class StopRequest:
    """Whether this process has been asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.leaving = False
        self._since = 0.0

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
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), time.monotonic()
        elif number != signal.SIGUSR1 and time.monotonic() - self._since > _ONE_REQUEST_S:
            # No clean-up: a save that is running uses a temporary folder, so the old checkpoint stays intact.
            os._exit(128 + number)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Inside the block, turn the signals in :data:`HANDLED` into a request (main thread only).

    After :meth:`StopRequest.leave` they stay ignored until the process ends.
    """
    request = StopRequest()
    ignored = [
        number for number in HANDLED if signal.getsignal(number) == signal.SIG_IGN
    ]  # SIGHUP, under nohup
    taken = [number for number in HANDLED if number not in ignored]
    previous = {number: signal.signal(number, request._receive) for number in taken}
    try:
        yield request
    finally:
        if not request.leaving:
            for number, handler in previous.items():
                signal.signal(number, handler)
