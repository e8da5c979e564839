"""Ctrl-C and SIGTERM: finish the step, save, exit 0. A second signal exits at once."""

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
        """The process ends by itself from here on: a signal no longer changes its exit code.

        torchrun sends SIGTERM to all ranks as soon as one has failed, and a rank that reports a failure elsewhere
        would otherwise show up as killed.
        """
        self.leaving = True
        for number in HANDLED:
            signal.signal(number, signal.SIG_IGN)  # unlike a handler in Python, this outlasts the interpreter

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None:
            # No clean-up: a save under way is in a temporary folder, and the old checkpoint stays whole.
            os._exit(128 + number)
        self.signal = signal.Signals(number)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the signals in :data:`HANDLED` into a request for the time of the block (main thread only).

    After :meth:`StopRequest.leave` they stay ignored, up to the end of the process.
    """
    request = StopRequest()
    previous = {number: signal.signal(number, request._receive) for number in HANDLED}
    try:
        yield request
    finally:
        if not request.leaving:
            for number, handler in previous.items():
                signal.signal(number, handler)
