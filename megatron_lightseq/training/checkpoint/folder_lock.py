"""One run at a time saves in a folder: a lock that the operating system releases when the process ends."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
from pathlib import Path

from megatron_lightseq.errors import CheckpointError, explain

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"


class FolderLock:
    """The right to save in a folder. Held until :meth:`release`, or until this process ends.

    A POSIX record lock: forked workers do not inherit it, and NFS and Lustre support it across hosts.
    """

    def __init__(self, root: Path) -> None:
        """Raises CheckpointError if another process holds the lock, with its host and process ID."""
        self._descriptor = os.open(root / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            owner = os.read(self._descriptor, 4096).decode(errors="replace").strip()
            os.close(self._descriptor)
            raise CheckpointError(
                explain(
                    got=f"--save {root} is in use by {_words(owner)}",
                    rule="one run at a time saves in a folder; another would remove the first one's unfinished saves",
                    remedy="Choose another --save, or wait until that run has ended",
                )
            ) from error
        except OSError as error:
            logger.warning(
                "%s: the file system has no locks (%s): make sure that no other run saves in this folder",
                root,
                error.strerror,
            )
        os.ftruncate(self._descriptor, 0)
        owner = json.dumps({"host": socket.gethostname(), "pid": os.getpid()})
        os.pwrite(self._descriptor, owner.encode() + b"\n", 0)

    def release(self) -> None:
        """Let another run save in the folder."""
        os.close(self._descriptor)


def _words(owner: str) -> str:
    try:
        known = json.loads(owner)
        return f"process {known['pid']} on {known['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
