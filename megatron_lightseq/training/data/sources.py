"""Which files a corpus is made of: folders are searched, links are followed, and what is left out has a reason."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_lightseq.errors import DataError, explain

STDLIB_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}
    | {"encodings", "pydoc_data"}
)
"""Folders of the standard library that hold third-party code, test data or generated tables."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFile:
    """A file that holds one document or many."""

    path: Path
    name: str
    """Path relative to the input that contains it: decides the order, and is the same on another machine."""
    explicit: bool = False
    """Named by the user, not found in a folder: refused rather than skipped if its format is unclear."""
    problem: str | None = None
    """Why it cannot be read, if this is already known from its folder; it is counted as skipped for this reason."""

    def stamp(self) -> str:
        """Name and SHA-256 of the content: decides whether a corpus is up to date. Reads the file."""
        if self.problem is not None:
            return f"{self.name}\0{self.problem}"
        try:
            with self.path.open("rb") as stream:
                return f"{self.name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}"
        except OSError as error:
            return f"{self.name}\0{error.strerror}"


def find_files(inputs: Sequence[Path]) -> list[SourceFile]:
    """Files that are named or found in folders (recursively), in an order that depends only on their names.

    Within a folder the order is that of the SHA-256 of the relative names: a split by document then takes a fair
    sample instead of the end of the alphabet. Hidden entries and caches are ignored. Symbolic links are followed;
    broken ones, loops, and links to what is read under another name are returned with a ``problem``.

    Raises:
        DataError: An input does not exist, or is neither a folder nor a regular file.
    """
    found: list[SourceFile] = []
    for given in inputs:
        if given.is_dir():
            found.extend(sorted(_Search(root=given).files(), key=_mixed))
        elif given.is_file():
            found.append(SourceFile(path=given, name=given.name, explicit=True))
        else:
            raise DataError(
                explain(
                    got=f"{given} is a pipe or a device" if given.exists() else f"{given} does not exist",
                    rule="an input is a folder, a text file or a file of documents (.jsonl, .json, .parquet)",
                    remedy="Check the path, or omit it to use the Python standard library",
                )
            )
    return found


def find_stdlib_files() -> list[SourceFile]:
    """The standard library's own Python source files, in the order of :func:`find_files`; links are ignored."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = _Search(root=root, ignored=STDLIB_SKIPPED, follow_links=False).files()
    return sorted((file for file in found if file.name.endswith(".py")), key=_mixed)


def _mixed(file: SourceFile) -> bytes:
    return hashlib.sha256(file.name.encode("utf-8", "surrogateescape")).digest()


@dataclass(kw_only=True, slots=True)
class _Search:
    """Walks one folder. Links are followed after all real entries have been visited, so that which of several paths to
    a file is used depends on names, not on the order in which a file system lists its entries."""

    root: Path
    ignored: frozenset[str] = frozenset()
    """Names of folders that are not searched."""
    follow_links: bool = True
    _folders: deque[str] = field(default_factory=lambda: deque([""]))
    """Names of folders to visit; the root is the empty name."""
    _links: deque[str] = field(default_factory=deque)
    _seen: set[str] = field(default_factory=set)
    """Real paths of the files and folders visited so far."""

    def files(self) -> Iterator[SourceFile]:
        """All files, with a problem where they cannot be read."""
        while self._folders or (self._links and self.follow_links):
            if self._folders:
                yield from self._visit(self._folders.popleft())
            else:
                yield from self._follow(self._links.popleft())

    def _visit(self, folder: str) -> Iterator[SourceFile]:
        real = os.path.realpath(self.root / folder)
        if real in self._seen:
            return
        self._seen.add(real)
        try:
            with os.scandir(self.root / folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            yield self._file(folder, f"folder that cannot be read ({error.strerror})")
            return
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_symlink():
                self._links.append(name)
            elif entry.is_dir():
                if not (entry.name.startswith("__pycache__") or entry.name in self.ignored):
                    self._folders.append(name)
            elif not entry.is_file():
                yield self._file(name, "pipe or device")
            elif self._is_new(name):
                yield self._file(name)

    def _follow(self, link: str) -> Iterator[SourceFile]:
        path = self.root / link
        real = os.path.realpath(path)
        if not path.exists():
            yield self._file(link, "broken link")
        elif path.is_dir():
            if os.path.realpath(path.parent).startswith(os.path.join(real, "")) or real in self._seen:
                yield self._file(link, "link to a folder that is read already")
            else:
                self._folders.append(link)
        elif not path.is_file():
            yield self._file(link, "pipe or device")
        elif self._is_new(link):
            yield self._file(link)
        else:
            yield self._file(link, "link to a file that is read already")

    def _is_new(self, name: str) -> bool:
        """Whether a file has not been met under another name; remembers it."""
        real = os.path.realpath(self.root / name)
        is_new = real not in self._seen
        self._seen.add(real)
        return is_new

    def _file(self, name: str, problem: str | None = None) -> SourceFile:
        return SourceFile(path=self.root / name, name=name or ".", problem=problem)
