"""Standard output that may go away: a closed pipe, a terminal that is gone or a full disk ends no run."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import IO, Any

_GONE = (errno.EPIPE, errno.EIO, errno.EBADF)


class LastingStream:
    """Writes to a stream of text for as long as that works; what cannot be written is lost."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As a text stream; returns the number of characters, as if all were written."""
        with self._forgiving():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As a text stream."""
        with self._forgiving():
            self._stream.flush()

    def isatty(self) -> bool:
        """As a text stream."""
        try:
            return self._stream.isatty()
        except ValueError:
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _GONE:
                self._replace()
        except ValueError:  # closed
            return

    def _replace(self) -> None:
        """Nobody reads any more: let later writes, and the interpreter's last flush, go nowhere."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
