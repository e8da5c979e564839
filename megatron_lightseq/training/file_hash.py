"""A fast hash of a file's content, against damage; an attacker could forge it."""

from __future__ import annotations

from pathlib import Path

import xxhash

_CHUNK_BYTES = 1 << 22


def hash_file(path: Path) -> str:
    """XXH3 (128 bits) of a file, in hexadecimal. Raises OSError."""
    hashed = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            hashed.update(chunk)
    return hashed.hexdigest()
