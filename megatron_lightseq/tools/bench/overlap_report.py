"""The overlap benchmark as a table, JSON and Markdown, with its verdict."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_lightseq.tools.bench.overlap import Expected, MethodTiming, OverlapJob, Speeds, expect
from megatron_lightseq.tools.markdown import markdown_table
from megatron_lightseq.tools.provenance import provenance

HEADER = (
    "method",
    "step s, overlap off",
    "on",
    "exposed s, off",
    "on",
    "of the step",
    "predicted",
    "verdict",
)
HIDEABLE = 0.05
"""Largest predicted exposed share of a step with which communication counts as hideable."""
HIDDEN = 0.10
"""Measured exposed share of a step below which communication counts as hidden."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One method: the slowest step and the longest wait of any rank, measured and predicted."""

    method: str
    on: MethodTiming
    off: MethodTiming
    expected: Expected

    @property
    def share(self) -> float:
        """Exposed share of a step, with overlap."""
        return self.on.exposed_seconds / self.on.seconds

    @property
    def expected_share(self) -> float:
        """Predicted exposed share of a step, with overlap."""
        return self.expected.exposed_seconds / self.expected.seconds

    @property
    def hideable(self) -> bool:
        """Whether kernels take long enough to hide the transfers, according to the prediction."""
        return self.expected_share <= HIDEABLE

    @property
    def holds(self) -> bool:
        """Whether communication is hidden if it can be."""
        return not self.hideable or self.share < HIDDEN

    def cells(self) -> list[str]:
        """Cells of the table."""
        verdict = ("hidden" if self.holds else "NOT hidden") if self.hideable else "cannot be hidden here"
        return [
            self.method,
            f"{self.off.seconds:.3f}",
            f"{self.on.seconds:.3f}",
            f"{self.off.exposed_seconds:.3f}",
            f"{self.on.exposed_seconds:.3f}",
            f"{self.share:.1%}",
            f"{self.expected_share:.1%}",
            verdict,
        ]


def rows(job: OverlapJob, answers: Sequence[dict[str, Any]]) -> list[Row]:
    """One row per method, from the answers of all ranks (:func:`megatron_lightseq.tools.bench.overlap.answer`)."""
    speeds = slowest([Speeds(**answer["speeds"]) for answer in answers])
    timings = [MethodTiming(**timing) for answer in answers for timing in answer["timings"]]
    found = []
    for method in job.methods:
        on, off = (
            _worst([one for one in timings if (one.method, one.overlap) == (method, overlap)])
            for overlap in (True, False)
        )
        expected = expect(job, method, len(answers), speeds, overlap=True)
        found.append(Row(method=method, on=on, off=off, expected=expected))
    return found


def slowest(speeds: Sequence[Speeds]) -> Speeds:
    """The lowest speeds of all ranks."""
    return Speeds(
        forward_flops_per_s=min(one.forward_flops_per_s for one in speeds),
        backward_flops_per_s=min(one.backward_flops_per_s for one in speeds),
        link_bytes_per_s=min(one.link_bytes_per_s for one in speeds),
        link_latency_s=max(one.link_latency_s for one in speeds),
    )


def _worst(timings: Sequence[MethodTiming]) -> MethodTiming:
    return dataclasses.replace(
        timings[0],
        seconds=max(one.seconds for one in timings),
        exposed_seconds=max(one.exposed_seconds for one in timings),
        bytes_sent=max(one.bytes_sent for one in timings),
    )


def caption(job: OverlapJob, answers: Sequence[dict[str, Any]], link: str) -> str:
    """What was measured, in one paragraph."""
    speeds = slowest([Speeds(**answer["speeds"]) for answer in answers])
    gigabits = speeds.link_bytes_per_s * 8 / 1e9
    return (
        f"{link}: {len(answers)} ranks of 1 thread, forward and backward of causal attention, {job.seq_length} tokens, "
        f"{job.num_heads} heads ({job.num_query_groups} key/value) of {job.head_dim}, {job.precision}, median of "
        f"{job.repetitions}. Measured beforehand: kernels {speeds.forward_flops_per_s / 1e9:.0f} and "
        f"{speeds.backward_flops_per_s / 1e9:.0f} GFLOP/s, link {gigabits:.2f} Gbit/s each way, "
        f"{speeds.link_latency_s * 1e6:.0f} us. Exposed: the longest time that a rank waited for transfers, measured "
        "and predicted by the simulator from these speeds; transfers count as hideable if at most "
        f"{HIDEABLE:.0%} of a step is predicted to be exposed, and as hidden if less than {HIDDEN:.0%} is"
    )


def write(
    job: OverlapJob, answers: Sequence[dict[str, Any]], link: str, folder: Path, name: str
) -> list[Path]:
    """Write NAME.json and NAME.md; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{kind}" for kind in ("json", "md")]
    made = rows(job, answers)
    record = {
        "job": dataclasses.asdict(job),
        "link": link,
        "machine": provenance(),
        "answers": list(answers),
        "rows": [dataclasses.asdict(row) for row in made],
    }
    paths[0].write_text(json.dumps(record, indent=1) + "\n")
    table = markdown_table(HEADER, [row.cells() for row in made])
    paths[1].write_text(f"{caption(job, answers, link)}.\n\n{table}\n\n{provenance()}.\n")
    return paths
