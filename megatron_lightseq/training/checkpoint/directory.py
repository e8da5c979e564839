"""A folder of checkpoints on disk: which are complete, which is the newest, and how a new one is added.

Files only, no tensors. A checkpoint is written under a temporary name and renamed once all of it is on the disk. A
process killed at any moment leaves the old checkpoints, the new one, or both, and possibly a temporary folder that is
ignored and removed later.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_lightseq.errors import CheckpointError, explain
from megatron_lightseq.training.checkpoint.manifest import MANIFEST_NAME, Manifest

LATEST_NAME = "latest"
STARTED_NAME = "run_started"
MEGATRON_TRACKER_NAME = "latest_checkpointed_iteration.txt"

# Megatron-LM's own folder names, so that its tools find the checkpoint that its tracker file names.
_COMPLETE = re.compile(r"iter_(\d{7,})")
_TEMPORARY = re.compile(r"iter_\d{7,}\.tmp-[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointDirectory:
    """The ``--save`` / ``--load`` folder of a run."""

    root: Path

    def candidates(self) -> list[Path]:
        """Folders with a complete checkpoint's name, newest first.

        A folder may also hold checkpoints of an earlier run that got further. Those are older than the file ``latest``
        and have more steps than the checkpoint it names; they come after all checkpoints of the present run.
        """
        if not self.root.is_dir():
            return []
        found = [path for path in self.root.iterdir() if _COMPLETE.fullmatch(path.name) and path.is_dir()]
        found = [path for path in found if not path.is_symlink()]
        return sorted(
            found, key=lambda path: (not self._is_overtaken(path), iteration_of(path)), reverse=True
        )

    def start(self) -> None:
        """Record that a run begins, so that :meth:`of_this_run` can tell its checkpoints from earlier ones.

        Raises:
            CheckpointError: the folder cannot be written to; better to fail now than at the first save.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._write_atomically(STARTED_NAME, "checkpoints older than this file belong to earlier runs")
        except OSError as error:
            raise CheckpointError(
                explain(
                    got=f"--save {self.root}: {error.strerror}",
                    rule="checkpoints are saved in that folder",
                    remedy="Choose a folder that this user may write to",
                )
            ) from error

    def of_this_run(self) -> list[Path]:
        """The :meth:`candidates` that were saved after :meth:`start`."""
        try:
            started = (self.root / STARTED_NAME).stat().st_mtime_ns
        except OSError:
            return []
        return [path for path in self.candidates() if (path / MANIFEST_NAME).stat().st_mtime_ns >= started]

    def _is_overtaken(self, path: Path) -> bool:
        tracker = self.root / LATEST_NAME
        try:
            latest = iteration_of(Path(tracker.read_text(encoding="utf-8").strip()))
            written = (path / MANIFEST_NAME).stat().st_mtime_ns
            return iteration_of(path) > latest and written < tracker.stat().st_mtime_ns
        except (OSError, ValueError, CheckpointError):  # no such file, or not written by us
            return False

    def begin(self, iteration: int) -> Path:
        """Create the temporary folder of one save, and return it."""
        temporary = self.root / f"{checkpoint_name(iteration)}.tmp-{uuid.uuid4().hex}"
        temporary.mkdir(parents=True)
        return temporary

    def commit(self, temporary: Path, manifest: Manifest) -> Path:
        """Turn a fully written temporary folder into a checkpoint; returns its path.

        The caller has fsynced the files. The order is: manifest, folder entries, rename, and finally the two files that
        name the newest checkpoint. An older checkpoint of the same iteration is replaced.
        """
        write_durably(temporary / MANIFEST_NAME, manifest.dumps())
        for folder in sorted({temporary, *(path for path in temporary.rglob("*") if path.is_dir())}):
            fsync_folder(folder)
        final = self.root / checkpoint_name(manifest.iteration)
        replaced = self._move_aside(final)
        os.rename(temporary, final)
        fsync_folder(self.root)
        self._write_atomically(LATEST_NAME, final.name)
        self._write_atomically(MEGATRON_TRACKER_NAME, str(manifest.iteration))
        fsync_folder(self.root)
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)
        return final

    def clean(self) -> list[str]:
        """Remove what killed saves have left; returns the removed names. Call it while no save is running."""
        if not self.root.is_dir():
            return []
        self.recover()
        unfinished = [path for path in self.root.iterdir() if _TEMPORARY.fullmatch(path.name)]
        for path in unfinished:
            shutil.rmtree(path, ignore_errors=True)
        return sorted(path.name for path in unfinished)

    def recover(self) -> list[str]:
        """Finish saves that were killed between two renames; returns the names of the recovered checkpoints.

        A temporary folder whose files match its manifest is a complete checkpoint. If no checkpoint of its iteration
        exists, it is renamed to its place; of several, the one written last. Call it while no save is running.
        """
        if not self.root.is_dir():
            return []
        intact = [
            path for path in self.root.iterdir() if _TEMPORARY.fullmatch(path.name) and _is_intact(path)
        ]
        recovered = []
        for path in sorted(intact, key=lambda path: (path / MANIFEST_NAME).stat().st_mtime_ns, reverse=True):
            final = path.with_name(path.name.partition(".tmp-")[0])
            if not final.exists():
                with contextlib.suppress(OSError):  # a read-only folder
                    os.rename(path, final)
                    recovered.append(final.name)
        return recovered

    def _move_aside(self, final: Path) -> Path | None:
        """Give the old checkpoint a temporary name: a folder cannot be renamed over one that is not empty."""
        if not final.exists():
            return None
        aside = final.with_name(f"{final.name}.tmp-{uuid.uuid4().hex}")
        os.rename(final, aside)
        return aside

    def _write_atomically(self, name: str, text: str) -> None:
        temporary = self.root / f"{name}.tmp"
        write_durably(temporary, text + "\n")
        os.replace(temporary, self.root / name)


def _is_intact(path: Path) -> bool:
    try:
        return not Manifest.read(path).problems(path)
    except CheckpointError:
        return False


def checkpoint_name(iteration: int) -> str:
    """Folder name of a checkpoint saved after ``iteration`` steps."""
    return f"iter_{iteration:07d}"


def iteration_of(path: Path) -> int:
    """The iteration in a checkpoint folder's name."""
    match = _COMPLETE.fullmatch(path.name)
    if match is None:
        raise CheckpointError(
            explain(
                got=f"folder {path.name}",
                rule=f"checkpoint folders are named like {checkpoint_name(20)}",
                remedy="Set --load to the folder that contains such folders",
            )
        )
    return int(match[1])


def write_durably(path: Path, text: str) -> None:
    """Write a text file and wait until its content is on the disk."""
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def fsync_files(folder: Path, names: Iterable[str]) -> None:
    """Wait until the content of the named files is on the disk."""
    for name in names:
        descriptor = os.open(folder / name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def fsync_folder(folder: Path) -> None:
    """Wait until a folder's entries (names, renames) are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
