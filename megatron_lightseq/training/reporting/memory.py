"""What the operating system says of this process's memory."""

from __future__ import annotations

import resource
import sys


def peak_resident_bytes() -> int:
    """The largest resident set this process ever had; the Python and torch libraries are part of it."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
