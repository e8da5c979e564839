"""The end of a process after a good run, without tearing down the interpreter.

An interpreter that has run ``torch.distributed`` is not always torn down cleanly. Threads of gloo release tensors, and
threads that have asked the store return from C++, and both need the interpreter. If it is being torn down at that
moment, the C++ runtime aborts ("terminate called without an active exception"), and a successful run ends with an
error status. Does not import torch.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys


class CleanExit:
    """Ends this process with status 0 once everything else that runs at exit has run, if :attr:`status` is 0 by then.

    Create it first thing: functions registered with :mod:`atexit` run in reverse order, and after threads that are not
    daemons have ended. Other statuses and errors exit as usual.
    """

    def __init__(self) -> None:
        self.status: int | None = None
        """The exit status of the run; None while it is not over."""
        atexit.register(self._end)

    def _end(self) -> None:
        if self.status != 0 or "torch" not in sys.modules:
            return
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # closed, or its reader is gone: the run was good
                stream.flush()
        os._exit(0)
