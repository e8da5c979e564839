"""From what ranks measured to figures that may be compared. No torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_lightseq.config.accounting import step_flops
from megatron_lightseq.tools.compare.job import Job, Measurement, Outcome, StepMeasurement
from megatron_lightseq.tools.compare.link import scheduled_bytes
from megatron_lightseq.tools.compare.systems import SYSTEMS
from megatron_lightseq.tools.provenance import provenance

LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
"""Largest relative difference between losses of one step that counts as the same computation. In fp32 parallel
layouts differ in the order of additions only (tests/megatron/test_parity.py asks for 1e-5 over five steps); in bf16
each rounds activations at other places."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """One system, all ranks and rounds together. Memory and bytes are those of the rank that has most."""

    system: str
    title: str
    losses: tuple[float, ...] = ()
    """Of every step, warm-up included."""
    step_seconds: tuple[float, ...] = ()
    """Of every timed step: the slowest rank's."""
    cpu_seconds: float = math.nan
    """Of a step, on the rank that computes most: median over steps."""
    tokens_per_second: float = math.nan
    """By the median step."""
    flops_per_second: float = math.nan
    """Model FLOP/s of all ranks: without recomputation and padding."""
    ceiling_fraction: float | None = None
    """Of the matrix products that all ranks do at once."""
    peak_resident_bytes: int = 0
    peak_tensor_bytes: int | None = None
    bytes_sent: int = 0
    """Per step."""
    mean_bytes_sent: float = 0.0
    """Per step, mean over ranks."""
    attention_bytes_sent: int = 0
    """Of these, attention's transfers, as counted."""
    scheduled_bytes_sent: int | None = None
    """The same by the schedule, computed without running; None where no schedule says."""
    link_bytes_sent: int | None = None
    """Per step through the watched interface, of the host that sends most."""
    exposed_seconds: float | None = None
    """Per step: median over steps of the rank that waits longest."""
    attention_forwards: int | None = None
    """Per step and rank: layers, times two where recomputation repeats them."""
    problem: str | None = None
    """Why there are no figures, or why they must not be compared."""
    refused: bool = False
    """It cannot run here at all, which is no failure."""

    @property
    def median_seconds(self) -> float:
        """Of the timed steps."""
        return statistics.median(self.step_seconds) if self.step_seconds else math.nan


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Systems side by side, and whether they may be compared."""

    baseline: str
    world_size: int
    precision: str
    setting: dict[str, Any]
    """The common configuration's keys that say what was run."""
    figures: tuple[Figures, ...]
    tolerance: float
    machine: str = ""
    """What it was measured on, with which versions."""
    disagreements: dict[str, str] = field(default_factory=dict)
    """System -> how its losses differ from the baseline's."""

    @property
    def agrees(self) -> bool:
        """Whether every system that can run here ran, with the baseline's losses."""
        failed = [row for row in self.figures if row.problem is not None and not row.refused]
        return not failed and not self.disagreements

    def speedup(self, row: Figures) -> float | None:
        """Tokens/s relative to the baseline's; None where losses differ or there is nothing to compare."""
        base = next((other for other in self.figures if other.system == self.baseline), None)
        if base is None or not base.step_seconds or not row.step_seconds or row.system in self.disagreements:
            return None
        return base.median_seconds / row.median_seconds

    def to_dict(self) -> dict[str, Any]:
        """For JSON; raw steps are part of it."""
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


def compare(job: Job, outcomes: Sequence[Outcome], baseline: str, vocab_size: int) -> Comparison:
    """Put the outcomes of one common job together; several of a system are rounds of it."""
    names = list(dict.fromkeys(outcome.system for outcome in outcomes))
    ceiling = _ceiling(outcomes)
    flops = step_flops(job.common, vocab_size)
    figures = tuple(
        summarize(job, [outcome for outcome in outcomes if outcome.system == name], flops, ceiling)
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


def summarize(job: Job, rounds: Sequence[Outcome], flops: float, ceiling: float | None) -> Figures:
    """One system's figures from its rounds."""
    name, title = rounds[0].system, SYSTEMS[rounds[0].system].title
    for outcome in rounds:
        if not outcome.ranks:
            problem = outcome.refusal or outcome.failure or "no measurement"
            return Figures(system=name, title=title, problem=problem, refused=outcome.refusal is not None)
    timed = [[step for step in rank.steps if not step.warmup] for outcome in rounds for rank in outcome.ranks]
    per_step = [list(ranks) for outcome in rounds for ranks in _by_step(outcome.ranks)]
    seconds = tuple(max(step.seconds for step in ranks) for ranks in per_step)
    median = statistics.median(seconds)
    tokens = job.common.training.seq_length * job.common.training.global_batch_size
    ranks = [rank for outcome in rounds for rank in outcome.ranks]
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
    """The timed steps, each with all ranks'."""
    return zip(*([step for step in rank.steps if not step.warmup] for rank in ranks), strict=True)


def _exposed(per_step: Sequence[Sequence[StepMeasurement]]) -> float | None:
    waits = [_most(step.exposed_seconds for step in ranks) for ranks in per_step]
    known = [wait for wait in waits if wait is not None]
    return statistics.median(known) if known else None


def _most(values: Iterable[Any]) -> Any:
    known = [value for value in values if value is not None]
    return max(known) if known else None


def _ceiling(outcomes: Sequence[Outcome]) -> float | None:
    """Matrix-product FLOP/s of all ranks at once: the best job's, for a busy machine only lowers it."""
    jobs = [[rank.matmul_flops_per_second for rank in outcome.ranks] for outcome in outcomes if outcome.ranks]
    return _most(sum(rates) for rates in jobs if rates and None not in rates)


def find_disagreements(figures: Sequence[Figures], baseline: str, tolerance: float) -> dict[str, str]:
    """Systems whose loss at any step is not the baseline's, in words."""
    base = next((row for row in figures if row.system == baseline and row.losses), None)
    found: dict[str, str] = {}
    for row in figures:
        if base is None or not row.losses:
            continue
        for step, (mine, wanted) in enumerate(zip(row.losses, base.losses, strict=True)):
            if not abs(mine - wanted) <= tolerance * abs(wanted):  # so that NaN is a difference
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
