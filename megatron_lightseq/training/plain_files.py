"""Reads small files that anybody may have written: only regular ones, up to a size, and by default never links."""

from __future__ import annotations

import os
import stat
from pathlib import Path

MAX_BYTES = 64 << 20


def read_plain(path: Path, max_bytes: int = MAX_BYTES, *, follow: bool = False) -> bytes:
    """The content of a regular file.

    Raises OSError for anything else: a pipe would block for ever, a link may lead to any file, and a device has no end.
    With ``follow``, the path may be a link: one that the user has named, not one in a folder that was handed over.
    """
    no_links = 0 if follow else os.O_NOFOLLOW
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | no_links)
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path.name} is not a regular file")
        if status.st_size > max_bytes:
            raise OSError(f"{path.name} has {status.st_size} bytes, and at most {max_bytes} are read")
        return stream.read(max_bytes)


def check_regular(path: Path) -> None:
    """Raise OSError for what :func:`read_plain` does not read, whatever its size."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise OSError(f"{path.name} is not a regular file")


def read_plain_text(path: Path, max_bytes: int = MAX_BYTES, *, follow: bool = False) -> str:
    """The same, as UTF-8. Raises OSError, or UnicodeDecodeError."""
    return read_plain(path, max_bytes, follow=follow).decode("utf-8")
