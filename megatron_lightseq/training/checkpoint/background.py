"""A save that goes on in a thread while the ranks train on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path


class BackgroundSave:
    """Runs ``write`` at once. The thread ends with its process, in whatever state: an incomplete save has no name."""

    def __init__(self, write: Callable[[], Path]) -> None:
        self._write = write
        self._folder: Path | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="mls-save", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._folder = self._write()
        except Exception as error:  # noqa: BLE001 - whatever it is, result() raises it in the main thread
            self._error = error

    @property
    def is_running(self) -> bool:
        """Whether this rank has not finished."""
        return self._thread.is_alive()

    def result(self) -> Path:
        """Wait; the checkpoint's folder. Raises what ``write`` has raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._folder is not None
        return self._folder
