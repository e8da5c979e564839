"""Runs systems against each other: interleaved, so that whatever else the machine does hits all of them alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from megatron_lightseq.config import PretrainConfig, with_values
from megatron_lightseq.tools.compare.job import Job, Outcome
from megatron_lightseq.tools.compare.launch import measure
from megatron_lightseq.tools.compare.systems import System
from megatron_lightseq.tools.compare.tables import Comparison, compare
from megatron_lightseq.tools.ranks import Cluster

VOCAB_SIZE = 256
"""Texts are bytes."""


def common_config(config: PretrainConfig, world_size: int) -> PretrainConfig:
    """The configuration that all systems start from: the vocabulary's padding must not depend on the system."""
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
    """Measure every system ``rounds`` times, in turn.

    Args:
        job: the common part; its system is not read.
        systems: what to compare, the baseline among them if speed-ups are wanted.
        baseline: name of the system that speed-ups and losses are relative to.
        rounds: how often to go round; memory is profiled in the first.
        cluster: where ranks run; default: this host.
        report: gets a line after every measurement.
    """
    cluster = cluster or Cluster()
    outcomes: list[Outcome] = []
    given_up: set[str] = set()
    for turn in range(rounds):
        for system in systems:
            if system.name in given_up:
                continue
            asked = replace(job, system=system.name, profile_memory=job.profile_memory and turn == 0)
            outcome = measure(asked, cluster)
            outcomes.append(outcome)
            if not outcome.ranks:
                given_up.add(system.name)
            report(f"round {turn + 1} of {rounds}: {system.name} {_said(outcome)}")
    return compare(job, outcomes, baseline, VOCAB_SIZE)


def _said(outcome: Outcome) -> str:
    if outcome.ranks:
        steps = [step.seconds for step in outcome.ranks[0].steps if not step.warmup]
        return f"{min(steps):.3f} s a step, loss {outcome.ranks[0].steps[-1].loss:.4f}"
    return "cannot run here" if outcome.refusal else f"failed: {outcome.failure}"
