"""The longest sequence that fits into memory: found by trying, with a limit that the operating system enforces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from megatron_lightseq.config import with_values
from megatron_lightseq.tools.compare.job import Job
from megatron_lightseq.tools.compare.launch import measure
from megatron_lightseq.tools.ranks import Cluster


@dataclass(frozen=True, kw_only=True, slots=True)
class Longest:
    """The result of a search."""

    system: str
    fits: int
    """Tokens; 0 if not even the first length fits."""
    too_long: int | None
    """The length that ran out of memory; None if the search ended before."""


def longest_sequence(
    job: Job,
    *,
    start: int,
    limit: int,
    halvings: int = 0,
    cluster: Cluster | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Longest:
    """Double the sequence length of ``job`` from ``start`` until a rank exceeds its ``memory_budget_bytes``.

    Runs one optimizer step at each length. Any other failure also ends the search, and is reported.

    Args:
        job: With a system and a memory budget.
        start: First length, in tokens.
        limit: Last length to try.
        halvings: Number of times to try the middle between a length that fits and one that does not.
        cluster: Where to run; default: this host.
        report: Called with a line of progress after each length.
    """
    assert job.memory_budget_bytes is not None, "the search needs a memory budget"
    cluster = cluster or Cluster()
    fits, length = 0, start
    while length <= limit and _runs(job, length, cluster, report):
        fits, length = length, 2 * length
    if length > limit:
        return Longest(system=job.system, fits=fits, too_long=None)
    too_long = length
    for _ in range(halvings if fits else 0):
        middle = (fits + too_long) // 2
        if _runs(job, middle, cluster, report):
            fits = middle
        else:
            too_long = middle
    return Longest(system=job.system, fits=fits, too_long=too_long)


def _runs(job: Job, length: int, cluster: Cluster, report: Callable[[str], None]) -> bool:
    """Whether a step with ``length`` tokens fits."""
    tried = replace(
        job,
        common=with_values(job.common, seq_length=length),
        warmup_steps=0,
        steps=1,
        profile_memory=False,
        measure_ceiling=False,
    )
    outcome = measure(tried, cluster)
    if outcome.ranks:
        report(f"{job.system}: {length} tokens fit")
        return True
    report(f"{job.system}: {length} tokens do not fit ({(outcome.failure or '').splitlines()[0]})")
    return False
