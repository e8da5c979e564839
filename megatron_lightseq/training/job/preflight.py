"""Before the first collective: make sure that all ranks run the same thing.

Every rank writes versions, the whole configuration, its kernel and the fingerprints of its schedules to the job's
store; rank 0 compares them and publishes one verdict. This is plain key-value traffic, because a collective between
ranks that disagree on sizes or types aborts without a traceback.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from megatron.core import __version__ as megatron_version

import megatron_lightseq
from megatron_lightseq import __version__
from megatron_lightseq.config import PretrainConfig, to_flat
from megatron_lightseq.errors import ConfigError, PeerFailureError, explain
from megatron_lightseq.training.file_hash import hash_file
from megatron_lightseq.training.job.words import ranges

_VERDICT = "preflight/verdict"


def config_fingerprint(config: PretrainConfig) -> str:
    """Short hash of every key and value."""
    text = json.dumps(to_flat(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def describe(config: PretrainConfig, **more: str) -> dict[str, str]:
    """What must be equal on all ranks, as text by name; ``more`` adds kernel, schedules and the like."""
    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron_core": megatron_version,
        "megatron_lightseq": __version__,
        **more,
    }
    return facts | {key: json.dumps(value, default=str) for key, value in to_flat(config).items()}


def package_hash() -> str:
    """Short hash of this package's files: an installation that was edited on one host is another version."""
    root = Path(megatron_lightseq.__file__).parent
    files = sorted(path for path in root.rglob("*") if path.suffix in (".py", ".so"))
    hashed = xxhash.xxh3_64()
    for path in files:
        hashed.update(f"{path.relative_to(root)} {hash_file(path)}".encode())
    return hashed.hexdigest()


def agree(
    store: dist.Store, facts: Mapping[str, str], *, rank: int, world_size: int, timeout_s: float
) -> None:
    """Return once all ranks have reported the same facts.

    Raises:
        ConfigError: they differ; the message is a table of keys, values and ranks, the same on every rank.
        PeerFailureError: a rank did not report in time; the message names it.
    """
    store.set(f"preflight/{rank}", json.dumps(dict(facts)))
    if rank == 0:
        store.set(_VERDICT, json.dumps(_judge(store, world_size, timeout_s)))
    _wait(store, _VERDICT, timeout_s + 5.0, absent="rank 0")
    kind, text = json.loads(store.get(_VERDICT))
    if kind == "absent":
        raise PeerFailureError(text)
    if kind == "differs":
        raise ConfigError(text)


def _judge(store: dist.Store, world_size: int, timeout_s: float) -> tuple[str, str]:
    reports: list[dict[str, Any]] = []
    for rank in range(world_size):
        try:
            _wait(store, f"preflight/{rank}", timeout_s, absent=f"rank {rank}")
        except PeerFailureError as error:
            return "absent", str(error)
        reports.append(json.loads(store.get(f"preflight/{rank}")))
    table = compare(reports)
    return ("differs", table) if table else ("same", "")


def compare(reports: list[dict[str, Any]]) -> str:
    """A table of the facts that differ between ranks; empty if none do."""
    keys = sorted({key for report in reports for key in report})
    rows = [("key", "value", "ranks")]
    for key in keys:
        values = [str(report.get(key, "(absent)")) for report in reports]
        for index, (value, _) in enumerate(Counter(values).most_common()):
            if len(set(values)) == 1:
                break
            ranks = [rank for rank, other in enumerate(values) if other == value]
            rows.append((key if index == 0 else "", value, ranges(ranks)))
    if len(rows) == 1:
        return ""
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return explain(
        got="The ranks disagree before the first step",
        rule="all ranks must run the same versions, configuration, data, kernel and schedules",
        remedy="Start every rank with the same environment, files and flags",
    ) + "".join(f"\n  {line.rstrip()}" for line in lines)


def _wait(store: dist.Store, key: str, timeout_s: float, *, absent: str) -> None:
    try:
        store.wait([key], timedelta(seconds=timeout_s))
    except (dist.DistStoreError, RuntimeError) as error:
        raise PeerFailureError(f"{absent} did not report within {timeout_s:.0f} s of the start") from error
