"""Where figures come from: the machine and the versions that a measurement was made with."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from megatron_lightseq import __version__


def provenance() -> str:
    """Processor, cores, versions, commit and date in one line; no host name, no paths."""
    return f"{processor()}, {versions()}"


def versions() -> str:
    """Cores, versions, commit and date."""
    libraries = f"torch {metadata.version('torch')}, megatron-core {metadata.version('megatron-core')}"
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return (
        f"{usable_cores()} cores, {libraries}, megatron_lightseq {__version__}{_commit()}, Python "
        f"{platform.python_version()}, {today}"
    )


def usable_cores() -> int:
    """Number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """Name of the processor."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit that is checked out; empty outside a git repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
    return f" at {found}"
