"""Where documents come from: folders, text files and JSON lines."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_lightseq.errors import DataError, explain

STDLIB_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}
    | {"encodings", "pydoc_data"}
)
"""Folders of the standard library that hold other people's code, test data or generated tables."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """A file that holds one document, or many as JSON lines."""

    path: Path
    name: str
    """Path relative to the input that found it: decides the order, and stays the same on another machine."""

    @property
    def is_jsonl(self) -> bool:
        """Whether every line is a JSON object of its own."""
        return self.path.suffix in (".jsonl", ".ndjson")

    def stamp(self) -> str:
        """Name, size and modification time: what tells whether the file changed."""
        status = self.path.stat()
        return f"{self.name}\0{status.st_size}\0{status.st_mtime_ns}"


@dataclass(kw_only=True, slots=True)
class ReadCounts:
    """What became of the files."""

    files: int = 0
    documents: int = 0
    bytes: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    """Number of files by reason."""

    def skip(self, reason: str) -> None:
        """Count one file that is left out."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1


def find_files(inputs: Sequence[Path]) -> list[SourceFile]:
    """The files of folders (recursively) and single files, in an order that depends on names only.

    Within a folder the order is that of the SHA-256 of the relative names: a split by document then takes a fair
    sample instead of the end of the alphabet. Hidden entries, caches and symbolic links are not followed.
    """
    found: list[SourceFile] = []
    for given in inputs:
        if given.is_dir():
            names = sorted(_walk(given, skipped=frozenset()), key=_mixed)
            found.extend(SourceFile(path=given / name, name=name) for name in names)
        elif given.is_file():
            found.append(SourceFile(path=given, name=given.name))
        else:
            raise DataError(
                explain(
                    got=f"{given} does not exist",
                    rule="an input is a folder, a text file or a .jsonl file",
                    remedy="Check the path, or leave it out for the Python standard library",
                )
            )
    return found


def find_stdlib_files() -> list[SourceFile]:
    """The standard library's own Python source files, in the order of :func:`find_files`."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [name for name in _walk(root, skipped=STDLIB_SKIPPED) if name.endswith(".py")]
    return [SourceFile(path=root / name, name=name) for name in sorted(names, key=_mixed)]


def _walk(root: Path, *, skipped: frozenset[str]) -> Iterator[str]:
    for folder, folders, files in os.walk(root, followlinks=False):
        folders[:] = [
            name for name in folders if not (name.startswith((".", "__pycache__")) or name in skipped)
        ]
        for name in files:
            path = Path(folder, name)
            if not name.startswith(".") and not path.is_symlink():
                yield path.relative_to(root).as_posix()


def _mixed(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


def read_documents(files: Iterable[SourceFile], counts: ReadCounts) -> Iterator[str]:
    """The text of every document; files that are no text are counted and left out."""
    for file in files:
        counts.files += 1
        for text in _read_jsonl(file.path) if file.is_jsonl else _read_text(file.path, counts):
            counts.documents += 1
            yield text


def _read_text(path: Path, counts: ReadCounts) -> Iterator[str]:
    try:
        content = path.read_bytes()
    except OSError as error:
        counts.skip(f"unreadable ({error.strerror})")
        return
    if not content:
        counts.skip("empty")
    elif b"\0" in content:
        counts.skip("binary")
    else:
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            counts.skip("not UTF-8")
            return
        counts.bytes += len(content)
        yield text


def _read_jsonl(path: Path) -> Iterator[str]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise _bad_line(path, number, type(error).__name__) from error
            if not isinstance(text, str):
                raise _bad_line(path, number, f"text is {type(text).__name__}")
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
                raise _bad_line(path, number, f"text is no Unicode, {error.reason}") from error
            if text:
                yield text


def _bad_line(path: Path, number: int, problem: str) -> DataError:
    return DataError(
        explain(
            got=f"{path} line {number} ({problem})",
            rule='every line of a .jsonl file is an object with the key "text"',
            remedy="Correct or remove the line",
        )
    )
