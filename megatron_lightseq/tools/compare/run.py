"""Measures systems in turns, so that other load on the machine affects all of them in the same way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from megatron_lightseq.config import PretrainConfig, with_values
from megatron_lightseq.tools.compare.job import VOCAB_SIZE, Job, JobResult
from megatron_lightseq.tools.compare.launch import measure
from megatron_lightseq.tools.compare.systems import System
from megatron_lightseq.tools.compare.tables import Comparison, compare
from megatron_lightseq.tools.ranks import Cluster


def common_config(config: PretrainConfig, world_size: int) -> PretrainConfig:
    """The configuration that all systems change; padding of the vocabulary must not depend on the system."""
    divisor = math.lcm(config.model.make_vocab_size_divisible_by, world_size)
    return with_values(config, make_vocab_size_divisible_by=divisor)


def run_comparison(
    job: Job,
    systems: Sequence[System],
    *,
    baseline: str,
    rounds: int = 1,
    cluster: Cluster | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Measure every system ``rounds`` times, in turns.

    Args:
        job: The common part; its ``system`` is ignored.
        systems: The systems to compare, including the baseline if speed-ups are wanted.
        baseline: Name of the system that speed-ups and losses are relative to.
        rounds: Number of measurements per system; memory is profiled in the first one.
        cluster: Where ranks run; default: this host.
        report: Called with a line of progress after each measurement.
    """
    cluster = cluster or Cluster()
    results: list[JobResult] = []
    failed: set[str] = set()
    for number in range(rounds):
        for system in systems:
            if system.name in failed:
                continue
            asked = replace(job, system=system.name, profile_memory=job.profile_memory and number == 0)
            result = measure(asked, cluster)
            results.append(result)
            if not result.ranks:
                failed.add(system.name)
            report(f"round {number + 1} of {rounds}: {system.name} {_progress(result)}")
    return compare(job, results, baseline, VOCAB_SIZE)


def _progress(result: JobResult) -> str:
    if result.ranks:
        steps = [step.seconds for step in result.ranks[0].steps if not step.warmup]
        return f"{min(steps):.3f} s per step, loss {result.ranks[0].steps[-1].loss:.4f}"
    return "cannot run here" if result.refusal else f"failed: {result.failure}"
