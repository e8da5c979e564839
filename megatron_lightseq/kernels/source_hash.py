"""Which C++ and CUDA sources a build of the kernels came from. Also loaded by setup.py, so it imports nothing of torch
or of this package.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

SUFFIXES = (".cpp", ".h", ".cu", ".cuh")


def source_hash(csrc: Path) -> str:
    """Short hash of all sources below a folder, with their names."""
    found = hashlib.sha256()
    for path in sorted(path for path in csrc.rglob("*") if path.suffix in SUFFIXES):
        text = path.read_bytes().replace(b"\r\n", b"\n")
        found.update(f"{path.relative_to(csrc).as_posix()} {len(text)}\n".encode() + text)
    return found.hexdigest()[:16]
