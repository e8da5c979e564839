"""This process's memory, as the operating system measures it."""

from __future__ import annotations

import resource
import sys


def peak_resident_bytes() -> int:
    """Peak resident memory of this process in bytes, including the libraries of Python and torch."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
