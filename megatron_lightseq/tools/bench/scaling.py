"""How the CPU kernel scales with threads: the same case on one thread and on several, measured alternately.

Measured by wall clock. A core that is used by something else appears as lost speed, so the machine must be idle
otherwise.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from megatron_lightseq.kernels.cpu import CpuKernel
from megatron_lightseq.tools.bench.cases import KernelCase
from megatron_lightseq.tools.bench.clock import timed, torch_threads
from megatron_lightseq.tools.bench.implementations import Inputs, TileKernel
from megatron_lightseq.tools.markdown import markdown_table
from megatron_lightseq.tools.provenance import provenance

HEADER = ("case", "forward", "backward", "forward + backward")
NAME = "cpu-scaling"


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaling:
    """One case: median seconds on one thread and on ``threads``."""

    case: KernelCase
    threads: int
    forward_s: tuple[float, float]
    backward_s: tuple[float, float]

    @property
    def total_s(self) -> tuple[float, float]:
        """Forward plus backward."""
        return self.forward_s[0] + self.backward_s[0], self.forward_s[1] + self.backward_s[1]

    def cells(self) -> list[str]:
        """Cells of the table: milliseconds on one thread and on several, and the speed-up."""
        pairs = (self.forward_s, self.backward_s, self.total_s)
        return [
            str(self.case),
            *(f"{one * 1e3:.0f} -> {many * 1e3:.0f} ms ({one / many:.2f}x)" for one, many in pairs),
        ]


def scaling_cases() -> list[KernelCase]:
    """Long full and causal attention, and a single head, whose work must be divided along the sequence."""
    cases = []
    for dtype in (torch.float32, torch.bfloat16):
        full = KernelCase(mask_kind="full", dtype=dtype, head_dim=64, seq_length=4096)
        causal = replace(full, mask_kind="causal")
        single = replace(causal, num_heads=1, num_kv_heads=1, seq_length=8192)
        cases += [full, causal, replace(causal, head_dim=128), single]
    return cases


def measure_scaling(case: KernelCase, threads: int, repetitions: int) -> Scaling:
    """Time our kernel alternately on one thread and on ``threads``, after one warm-up round.

    Restores torch's number of threads.
    """
    kernel = TileKernel(CpuKernel(), case, Inputs.random(case))
    seconds: dict[tuple[int, str], list[float]] = {}
    for repetition in range(repetitions + 1):
        for count in (1, threads):
            with torch_threads(count):
                kernel.forward()  # not timed: the first call after changing the number of threads starts them
                for direction, call in (("forward", kernel.forward), ("backward", kernel.backward)):
                    taken = timed(call)
                    if repetition > 0:
                        seconds.setdefault((count, direction), []).append(taken)

    def medians(direction: str) -> tuple[float, float]:
        one, many = (statistics.median(seconds[count, direction]) for count in (1, threads))
        return one, many

    return Scaling(case=case, threads=threads, forward_s=medians("forward"), backward_s=medians("backward"))


def caption(threads: int, repetitions: int) -> str:
    """How to read the table, and where it was measured."""
    return (
        f"Our kernel, variant {CpuKernel().isa}, on 1 -> {threads} threads (speed-up): wall clock, measured "
        f"alternately, median of {repetitions}. {provenance()}."
    )


def write_reports(rows: Sequence[Scaling], folder: Path, repetitions: int) -> list[Path]:
    """Write NAME.json and NAME.md; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{NAME}.{suffix}" for suffix in ("json", "md")]
    records = [asdict(row) | {"case": str(row.case)} for row in rows]
    paths[0].write_text(json.dumps({"machine": provenance(), "rows": records}, indent=1) + "\n")
    table = markdown_table(HEADER, [row.cells() for row in rows])
    paths[1].write_text(f"{table}\n\n{caption(rows[0].threads, repetitions)}\n")
    return paths
