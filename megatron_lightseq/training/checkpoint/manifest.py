"""The manifest of a checkpoint: every file with its size and SHA-256, and which model and run it belongs to.

The loader ignores checkpoints without a valid manifest. The manifest has a checksum of itself, so that a flipped bit in
the manifest can be distinguished from one in a file that it lists.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_lightseq.errors import CheckpointError, explain
from megatron_lightseq.training.checkpoint.lineage import Lineage
from megatron_lightseq.training.plain_files import read_plain_text

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1

_HASH_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """One file of a checkpoint."""

    name: str
    """Path relative to the checkpoint folder, with forward slashes; never outside it."""
    num_bytes: int
    sha256: str

    @classmethod
    def of(cls, folder: Path, name: str) -> FileRecord:
        """Hash the file ``folder / name`` as it is now."""
        digest = hashlib.sha256()
        num_bytes = 0
        with (folder / name).open("rb") as stream:
            while chunk := stream.read(_HASH_CHUNK_BYTES):
                digest.update(chunk)
                num_bytes += len(chunk)
        return cls(name=name, num_bytes=num_bytes, sha256=digest.hexdigest())

    def problem(self, folder: Path) -> str | None:
        """What is wrong with the file, or None. A file of the wrong size is not hashed."""
        path = folder / self.name
        if path.is_symlink() or not path.is_file():
            return f"{self.name} is missing"
        num_bytes = path.stat().st_size
        if num_bytes != self.num_bytes:
            return f"{self.name} has {num_bytes} bytes and should have {self.num_bytes}"
        if FileRecord.of(folder, self.name).sha256 != self.sha256:
            return f"{self.name} is damaged (SHA-256 differs)"
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The contents of a checkpoint; written last, so that its presence shows that the rest has been written."""

    iteration: int
    consumed_samples: int
    model: Mapping[str, Any]
    """The configuration keys that determine what the weights are and mean."""
    optimizer: Mapping[str, Any]
    """The configuration keys that determine the form of the optimizer state."""
    data: Mapping[str, Any]
    """The configuration keys that determine the order of the training samples."""
    corpus: Mapping[str, Any] = field(default_factory=dict)
    """What the run reads: corpus, mixture and tokenizer; empty if the program that trains did not say."""
    losses: tuple[float, ...] = ()
    """Of the last good steps, which the next one is judged by."""
    world: Mapping[str, int]
    """Sizes of the parallel groups that saved the checkpoint."""
    config_fingerprint: str
    versions: Mapping[str, str]
    lineage: Lineage = field(default_factory=Lineage)
    """The run that saved the checkpoint."""
    files: tuple[FileRecord, ...] = field(default=())

    def dumps(self) -> str:
        """JSON text with a checksum of its own content."""
        content = {"format": FORMAT_VERSION, **asdict(self), "lineage": self.lineage.to_json()}
        return json.dumps({"content": content, "sha256": _content_hash(content)}, indent=1, sort_keys=True)

    @classmethod
    def loads(cls, text: str) -> Manifest:
        """Parse :meth:`dumps`. Raises ValueError for anything that is not a complete manifest of this format."""
        document = json.loads(text)
        content = document["content"]
        if document["sha256"] != _content_hash(content):
            raise ValueError("its checksum does not match its content")
        if content.pop("format") != FORMAT_VERSION:
            raise ValueError(f"its format is not {FORMAT_VERSION}")
        files = tuple(FileRecord(**entry) for entry in content.pop("files"))
        for entry in files:
            if not isinstance(entry.num_bytes, int) or not isinstance(entry.sha256, str):
                raise ValueError(f"the record of {entry.name!r} has no size and hash")
            check_relative(entry.name)
        _check_types(content)
        lineage = Lineage.of_json(content.pop("lineage"))
        losses = tuple(float(loss) for loss in content.pop("losses", ()))
        return cls(files=files, lineage=lineage, losses=losses, **content)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read a checkpoint's manifest. Raises CheckpointError, with the file's name, if it cannot be trusted."""
        path = folder / MANIFEST_NAME
        try:
            return cls.loads(read_plain_text(path))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                explain(
                    got=f"{path}: {type(error).__name__}: {error}",
                    rule="a checkpoint must have a readable manifest that matches its own checksum",
                    remedy="Load another checkpoint, or save this one again",
                )
            ) from error

    def problems(self, folder: Path, *, part: int = 0, num_parts: int = 1) -> list[str]:
        """Damage found in this part of the files (file i belongs to part ``i % num_parts``)."""
        found = (record.problem(folder) for record in self.files[part::num_parts])
        return [text for text in found if text is not None]


def _check_types(content: Mapping[str, Any]) -> None:
    """A checksum shows that the text is as it was written, not that this package wrote it."""
    kinds = {"iteration": int, "consumed_samples": int, "config_fingerprint": str}
    kinds |= dict.fromkeys(("model", "optimizer", "data", "world", "versions", "corpus"), dict)
    for name, kind in kinds.items():
        if name in content and not isinstance(content[name], kind):
            raise ValueError(f"{name} is no {kind.__name__}")


def check_relative(name: str) -> None:
    """Raise ValueError if ``name`` leads out of the folder that it is joined to."""
    path = Path(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise ValueError(f"file name {name!r} leads out of the checkpoint")


def record_files(folder: Path, names: Iterable[str]) -> list[FileRecord]:
    """Hash ``names`` below ``folder``, in sorted order."""
    return [FileRecord.of(folder, name) for name in sorted(names)]


def _content_hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
