"""A log file per rank and attempt: where it ran, what it did and when, its warnings, its errors with tracebacks.

Nothing here may end a run: a log that cannot be written is left out.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from megatron_lightseq.training.job.launch import Launch

FOLDER_NAME = "logs"
_events = logging.getLogger(f"{__name__}.events")
_FORM = "%(asctime)s %(levelname)s %(message)s"


class _File(logging.StreamHandler[TextIO]):
    """To an open file; errors of the disk are nobody's concern here."""

    def handleError(self, record: logging.LogRecord) -> None:
        del record


_open: list[_File] = []  # of this process; watchers on other threads write here when the main thread cannot


def log_path(folder: Path, launch: Launch) -> Path:
    """The file of one rank and attempt. A later command with the same folder appends to it."""
    return folder / FOLDER_NAME / f"attempt_{launch.attempt}" / f"rank_{launch.rank:05d}.log"


@contextmanager
def rank_log(folder: Path | None, launch: Launch) -> Iterator[None]:
    """Inside the block, write a log below ``folder``; without one, or if it cannot be written, nothing happens."""
    handler = _opened(folder, launch)
    if handler is None:
        yield
        return
    package = logging.getLogger("megatron_lightseq")
    package.addHandler(handler)
    _events.setLevel(logging.INFO)
    _events.propagate, before = False, _events.propagate
    _events.addHandler(handler)
    _open.append(handler)
    faulthandler.enable(handler.stream)
    note(
        f"rank {launch.rank} of {launch.world_size}, attempt {launch.attempt}, process {os.getpid()} on "
        f"{socket.gethostname()}"
    )
    try:
        yield
        note("ended")
    except BaseException as error:
        _events.error("ended by %s", type(error).__name__, exc_info=True)
        raise
    finally:
        faulthandler.disable()
        _open.remove(handler)
        _events.removeHandler(handler)
        _events.propagate = before
        package.removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.stream.close()


def _opened(folder: Path | None, launch: Launch) -> _File | None:
    if folder is None:
        return None
    path = log_path(folder, launch)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = _File(path.open("a", encoding="utf-8", errors="replace"))
    except OSError:
        return None
    handler.setFormatter(logging.Formatter(_FORM))
    return handler


def note(text: str) -> None:
    """Write a line to this rank's log, if it has one."""
    if _open:
        _events.info("%s", text)


def dump_stacks(why: str) -> None:
    """Write what every thread of this process is doing to its log, if it has one; from any thread."""
    note(f"{why}; the stacks of all threads:")
    for handler in _open:
        with contextlib.suppress(OSError, ValueError):
            faulthandler.dump_traceback(handler.stream)
