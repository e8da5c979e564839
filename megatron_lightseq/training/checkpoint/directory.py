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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_lightseq.errors import CheckpointError, explain
from megatron_lightseq.training.checkpoint.folder_lock import FolderLock
from megatron_lightseq.training.checkpoint.lineage import Lineage
from megatron_lightseq.training.checkpoint.manifest import MANIFEST_NAME, Manifest
from megatron_lightseq.training.plain_files import read_plain_text

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
        """Complete checkpoints of the run that saved last, and of the runs that it continues, newest first.

        The folder may also hold checkpoints of other runs, which may have got further; they are left out. One with a
        damaged manifest may be anybody's, and is included, so that the damage is reported.
        """
        line = self.line()
        found = sorted(self._complete(), key=iteration_of, reverse=True)
        return [path for path in found if line is None or _is_on(line, path)]

    def line(self) -> Lineage | None:
        """The run that saved last in this folder; None if no file tells."""
        with contextlib.suppress(OSError, ValueError, CheckpointError):
            newest = self.root / read_plain_text(self.root / LATEST_NAME).strip()
            iteration_of(newest)
            return Manifest.read(newest).lineage
        return self.started()

    def at(self, iteration: int) -> Path:
        """The checkpoint of a step that is among :meth:`iterations`."""
        return next(path for path in self._complete() if iteration_of(path) == iteration)

    def iterations(self) -> list[int]:
        """The steps of all checkpoints in the folder, of whichever run."""
        return sorted(map(iteration_of, self._complete()))

    def start(self, line: Lineage) -> None:
        """Record that a run begins, so that ranks that are restarted find what it has saved.

        Raises:
            CheckpointError: the folder cannot be written to; better to fail now than at the first save.
        """
        with self._writable():
            self.root.mkdir(parents=True, exist_ok=True)
            self._write_atomically(STARTED_NAME, line.dumps())

    def started(self) -> Lineage | None:
        """The run that began last in this folder."""
        try:
            return Lineage.loads(read_plain_text(self.root / STARTED_NAME))
        except (OSError, UnicodeDecodeError):
            return None

    def of_this_run(self) -> list[Path]:
        """The checkpoints of the run that began last, and of those that it continues; empty if it has saved none."""
        line = self.started()
        latest = self.line()
        return self.candidates() if line is not None and latest is not None and latest.run == line.run else []

    def lock(self) -> FolderLock:
        """Keep other runs from saving here.

        Raises:
            CheckpointError: another run holds the lock, or the folder cannot be written to.
        """
        with self._writable():
            self.root.mkdir(parents=True, exist_ok=True)
            return FolderLock(self.root)

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                explain(
                    got=f"--save {self.root}: {error.strerror}",
                    rule="checkpoints are saved in that folder",
                    remedy="Choose a folder that this user may write to",
                )
            ) from error

    def _complete(self) -> list[Path]:
        """Folders with a complete checkpoint's name, and saves that were killed between two renames.

        The latter are complete as well: their files match their manifest, and no checkpoint of their step exists.
        """
        if not self.root.is_dir():
            return []
        folders = [path for path in self.root.iterdir() if path.is_dir() and not path.is_symlink()]
        placed = [path for path in folders if _COMPLETE.fullmatch(path.name)]
        taken = {path.name for path in placed}
        stranded = [
            path for path in folders if _TEMPORARY.fullmatch(path.name) and _final(path).name not in taken
        ]
        return placed + [path for path in stranded if _is_intact(path)]

    def begin(self, iteration: int, num_bytes: int = 0) -> Path:
        """Create the temporary folder of one save, and return it.

        Raises:
            CheckpointError: the disk has no room for ``num_bytes``; of what killed saves have left, nothing counts.
            OSError: the folder cannot be made.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.root).free
        if free < num_bytes:
            raise CheckpointError(
                explain(
                    got=f"{free:,} bytes are free for --save {self.root}, and the checkpoint has {num_bytes:,}",
                    rule="nothing is written that does not fit",
                    remedy="Make room, or keep fewer checkpoints with --save-keep-last; older ones are untouched",
                )
            )
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
        final = _final(temporary)
        replaced = self._move_aside(final)
        try:
            os.rename(temporary, final)
        except OSError:
            if replaced is not None:
                os.rename(replaced, final)
            raise
        fsync_folder(self.root)
        self._write_atomically(LATEST_NAME, final.name)
        self._write_atomically(MEGATRON_TRACKER_NAME, str(manifest.iteration))
        fsync_folder(self.root)
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)
        return final

    def prune(self, *, keep_last: int | None, retain_interval: int | None) -> list[str]:
        """Remove checkpoints of this run that are no longer wanted; returns their names.

        Call it while no save is running.

        Args:
            keep_last: number of newest checkpoints to keep; None stands for 1 with a ``retain_interval``, else for all.
            retain_interval: checkpoints at multiples of this many steps are kept as well.
        """
        if keep_last is None and retain_interval is None:
            return []
        readable = [path for path in self.candidates() if _lineage(path) is not None]
        removed = []
        for path in readable[keep_last or 1 :]:
            if retain_interval is None or iteration_of(path) % retain_interval:
                aside = self._move_aside(path)  # a half-removed folder must not have a checkpoint's name
                if aside is not None:
                    (aside / MANIFEST_NAME).unlink(missing_ok=True)  # nor be recovered
                    shutil.rmtree(aside, ignore_errors=True)
                removed.append(path.name)
        return removed

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
            final = _final(path)
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
        try:
            write_durably(temporary, text + "\n")
            os.replace(temporary, self.root / name)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def _is_on(line: Lineage, path: Path) -> bool:
    own = _lineage(path)
    return own is None or line.includes(own, iteration_of(path))


def _lineage(path: Path) -> Lineage | None:
    """The run that saved a checkpoint; None if its manifest cannot be trusted."""
    try:
        return Manifest.read(path).lineage
    except CheckpointError:
        return None


def _final(temporary: Path) -> Path:
    return temporary.with_name(temporary.name.partition(".tmp-")[0])


def _is_intact(path: Path) -> bool:
    try:
        return not Manifest.read(path).problems(path)
    except CheckpointError:
        return False


def checkpoint_name(iteration: int) -> str:
    """Folder name of a checkpoint saved after ``iteration`` steps."""
    return f"iter_{iteration:07d}"


def iteration_of(path: Path) -> int:
    """The iteration in the name of a checkpoint's folder, final or temporary."""
    match = _COMPLETE.fullmatch(_final(path).name)
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
