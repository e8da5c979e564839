"""From the measurements of ranks to comparable figures. Does not import torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_lightseq.config.accounting import step_flops
from megatron_lightseq.tools.compare.job import Job, JobResult, Measurement, StepMeasurement
from megatron_lightseq.tools.compare.link import scheduled_bytes
from megatron_lightseq.tools.compare.systems import SYSTEMS
from megatron_lightseq.tools.provenance import provenance

LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
"""Largest relative difference of losses in a step that counts as the same computation. In fp32, parallel layouts differ
only in the order of additions (tests/megatron/test_parity.py requires 1e-5 over five steps); in bf16, they round
activations at different places."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """One system, over all ranks and rounds. Memory and bytes are the maximum over ranks."""

    system: str
    title: str
    losses: tuple[float, ...] = ()
    """Of every step, including warm-up."""
    step_seconds: tuple[float, ...] = ()
    """Of every timed step, on the slowest rank."""
    cpu_seconds: float = math.nan
    """CPU time of a step on the busiest rank, median over steps."""
    tokens_per_second: float = math.nan
    """In the median step."""
    flops_per_second: float = math.nan
    """Model FLOP/s of all ranks, without recomputation and padding."""
    ceiling_fraction: float | None = None
    """Relative to the rate of matrix products on all ranks."""
    peak_resident_bytes: int = 0
    peak_tensor_bytes: int | None = None
    bytes_sent: int = 0
    """Per step."""
    mean_bytes_sent: float = 0.0
    """Per step, mean over ranks."""
    attention_bytes_sent: int = 0
    """The part of these that is sent by attention, as counted."""
    scheduled_bytes_sent: int | None = None
    """The same computed from the schedule; None if the schedule does not say."""
    link_bytes_sent: int | None = None
    """Per step through the network interface, on the host that sends most."""
    exposed_seconds: float | None = None
    """Per step, on the rank that waits longest; median over steps."""
    attention_forwards: int | None = None
    """Per step and rank: the number of layers, doubled if attention is recomputed."""
    problem: str | None = None
    """Why there are no figures, or why they must not be compared."""
    refused: bool = False
    """Whether it cannot run on this machine, which is not a failure."""

    @property
    def median_seconds(self) -> float:
        """Median duration of the timed steps."""
        return statistics.median(self.step_seconds) if self.step_seconds else math.nan


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The figures of all systems, and whether they can be compared."""

    baseline: str
    world_size: int
    precision: str
    setting: dict[str, Any]
    """The main keys of the common configuration."""
    figures: tuple[Figures, ...]
    tolerance: float
    machine: str = ""
    """Machine and versions of the measurement."""
    disagreements: dict[str, str] = field(default_factory=dict)
    """By system, how its losses differ from the baseline's."""

    @property
    def agrees(self) -> bool:
        """Whether all systems that can run on this machine ran, with the losses of the baseline."""
        failed = [row for row in self.figures if row.problem is not None and not row.refused]
        return not failed and not self.disagreements

    def speedup(self, row: Figures) -> float | None:
        """Tokens/s relative to the baseline; None if losses differ or one of the two has no figures."""
        base = next((other for other in self.figures if other.system == self.baseline), None)
        if base is None or not base.step_seconds or not row.step_seconds or row.system in self.disagreements:
            return None
        return base.median_seconds / row.median_seconds

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON, including the individual steps."""
        rows = [
            {**asdict(row), "speedup": self.speedup(row), "median_seconds": row.median_seconds}
            for row in self.figures
        ]
        return {
            "baseline": self.baseline,
            "world_size": self.world_size,
            "precision": self.precision,
            "setting": self.setting,
            "machine": self.machine,
            "tolerance": self.tolerance,
            "agrees": self.agrees,
            "disagreements": self.disagreements,
            "figures": rows,
        }


def compare(job: Job, results: Sequence[JobResult], baseline: str, vocab_size: int) -> Comparison:
    """Combine the results of one common job; several results of a system are its rounds."""
    names = list(dict.fromkeys(result.system for result in results))
    ceiling = _ceiling(results)
    flops = step_flops(job.common, vocab_size)
    figures = tuple(
        summarize(job, [result for result in results if result.system == name], flops, ceiling)
        for name in names
    )
    precision = "bf16" if job.common.training.bf16 else "fp32"
    tolerance = LOSS_TOLERANCE[precision]
    return Comparison(
        baseline=baseline,
        world_size=job.world_size,
        precision=precision,
        setting=_setting(job),
        figures=figures,
        tolerance=tolerance,
        machine=provenance(),
        disagreements=find_disagreements(figures, baseline, tolerance),
    )


def summarize(job: Job, rounds: Sequence[JobResult], flops: float, ceiling: float | None) -> Figures:
    """The figures of one system from its rounds."""
    name, title = rounds[0].system, SYSTEMS[rounds[0].system].title
    for result in rounds:
        if not result.ranks:
            problem = result.refusal or result.failure or "no measurement"
            return Figures(system=name, title=title, problem=problem, refused=result.refusal is not None)
    timed = [[step for step in rank.steps if not step.warmup] for result in rounds for rank in result.ranks]
    per_step = [list(ranks) for result in rounds for ranks in _by_step(result.ranks)]
    seconds = tuple(max(step.seconds for step in ranks) for ranks in per_step)
    median = statistics.median(seconds)
    tokens = job.common.training.seq_length * job.common.training.global_batch_size
    ranks = [rank for result in rounds for rank in result.ranks]
    sent = [steps[-1].bytes_sent for steps in timed]
    return Figures(
        system=name,
        title=title,
        losses=tuple(step.loss for step in rounds[0].ranks[0].steps),
        step_seconds=seconds,
        cpu_seconds=statistics.median(max(step.cpu_seconds for step in ranks) for ranks in per_step),
        tokens_per_second=tokens / median,
        flops_per_second=flops / median,
        ceiling_fraction=None if ceiling is None else flops / median / ceiling,
        peak_resident_bytes=max(rank.peak_resident_bytes for rank in ranks),
        peak_tensor_bytes=_most(rank.peak_tensor_bytes for rank in ranks),
        bytes_sent=max(sent),
        mean_bytes_sent=statistics.fmean(sent),
        attention_bytes_sent=max(steps[-1].attention_bytes_sent for steps in timed),
        scheduled_bytes_sent=scheduled_bytes(SYSTEMS[name].configure(job.common, job.world_size)),
        link_bytes_sent=_most(steps[-1].link_bytes_sent for steps in timed),
        exposed_seconds=_exposed(per_step),
        attention_forwards=max(steps[-1].attention_forwards for steps in timed)
        if ranks[0].counts_forwards
        else None,
    )


def _by_step(ranks: Sequence[Measurement]) -> Iterable[tuple[StepMeasurement, ...]]:
    """The timed steps, each with the measurements of all ranks."""
    return zip(*([step for step in rank.steps if not step.warmup] for rank in ranks), strict=True)


def _exposed(per_step: Sequence[Sequence[StepMeasurement]]) -> float | None:
    waits = [_most(step.exposed_seconds for step in ranks) for ranks in per_step]
    known = [wait for wait in waits if wait is not None]
    return statistics.median(known) if known else None


def _most(values: Iterable[Any]) -> Any:
    known = [value for value in values if value is not None]
    return max(known) if known else None


def _ceiling(results: Sequence[JobResult]) -> float | None:
    """FLOP/s of matrix products on all ranks together: the highest of all jobs, because other load lowers it."""
    jobs = [[rank.matmul_flops_per_second for rank in result.ranks] for result in results if result.ranks]
    return _most(sum(rates) for rates in jobs if rates and None not in rates)


def find_disagreements(figures: Sequence[Figures], baseline: str, tolerance: float) -> dict[str, str]:
    """Systems with a loss that differs from the baseline's, and where it does."""
    base = next((row for row in figures if row.system == baseline and row.losses), None)
    found: dict[str, str] = {}
    for row in figures:
        if base is None or not row.losses:
            continue
        for step, (mine, wanted) in enumerate(zip(row.losses, base.losses, strict=True)):
            if not abs(mine - wanted) <= tolerance * abs(wanted):  # true for NaN
                found[row.system] = f"loss {mine:.6f} at step {step}, {baseline} has {wanted:.6f}"
                break
    return found


def _setting(job: Job) -> dict[str, Any]:
    model, training, recompute = job.common.model, job.common.training, job.common.recompute
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.query_groups,
        "seq_length": training.seq_length,
        "global_batch_size": training.global_batch_size,
        "recompute_granularity": recompute.recompute_granularity,
        "warmup_steps": job.warmup_steps,
        "steps": job.steps,
        "threads_per_rank": job.threads,
    }
