"""What has become of a checkpoint: *healthy* once the next step was good, suspect once that step has failed twice.

The marks are files in the checkpoint's folder that its manifest does not list. Only the run that holds the folder's
lock writes them.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from megatron_lightseq.training.plain_files import read_plain_text

HEALTHY_NAME, FAILED_NAME = "healthy", "failed_next_steps"
FAILURES_OF_A_SUSPECT = 2


def mark_healthy(folder: Path) -> None:
    """The step after this checkpoint was good. A mark that cannot be written is no reason to stop."""
    with contextlib.suppress(OSError):
        (folder / HEALTHY_NAME).touch()
        (folder / FAILED_NAME).unlink(missing_ok=True)


def is_healthy(folder: Path) -> bool:
    """Whether the step after this checkpoint was good once."""
    return (folder / HEALTHY_NAME).is_file()


def record_failure(folder: Path) -> int:
    """The step after this checkpoint was bad; returns how often that has happened without a good one."""
    count = failures(folder) + 1
    with contextlib.suppress(OSError):
        (folder / FAILED_NAME).write_text(f"{count}\n", encoding="utf-8")
    return count


def failures(folder: Path) -> int:
    """How often the step after this checkpoint was bad; 0 for a healthy one."""
    if is_healthy(folder):
        return 0
    try:
        return min(int(read_plain_text(folder / FAILED_NAME)[:8]), 1000)
    except (OSError, ValueError):
        return 0


def is_suspect(folder: Path) -> bool:
    """Whether what the checkpoint holds is probably spoiled, although its files are intact."""
    return failures(folder) >= FAILURES_OF_A_SUSPECT
