"""Compressed files, recognised by their first bytes: a suffix can be missing, or be left over after decompression."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from megatron_lightseq.errors import DataError, explain

_OPENERS: Mapping[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}
_SUFFIXES = frozenset({".gz", ".bz2", ".xz"})
_UNSUPPORTED = {
    b"\x28\xb5\x2f\xfd": "Zstandard file",
    b"\x04\x22\x4d\x18": "LZ4 file",
    b"PK\x03\x04": "ZIP archive",
    b"7z\xbc\xaf\x27\x1c": "7z archive",
}
_HEAD_BYTES = 8


def open_decompressed(path: Path) -> IO[bytes]:
    """The content of a file, decompressed if it is gzip, bzip2 or xz. Raises OSError if it cannot be opened."""
    head = _head(path)
    for magic, opener in _OPENERS.items():
        if head.startswith(magic):
            return cast(IO[bytes], opener(path))
    return path.open("rb")


def unsupported_format(path: Path) -> str | None:
    """Name of a compressed format that cannot be read here; None for all other files. Raises OSError."""
    head = _head(path)
    return next((name for magic, name in _UNSUPPORTED.items() if head.startswith(magic)), None)


def inner_suffixes(path: Path) -> list[str]:
    """Suffixes of a file's name in lower case, without those of compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return [suffix for suffix in suffixes if suffix not in _SUFFIXES]


@contextmanager
def naming_damage(path: Path) -> Iterator[None]:
    """Turns errors of reading and decompression inside the block into a DataError that names the file."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise DataError(
            explain(
                got=f"{path} is damaged ({error})",
                rule="a file is read to its end",
                remedy="Download or compress it again, or remove it",
            )
        ) from error


def _head(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(_HEAD_BYTES)
