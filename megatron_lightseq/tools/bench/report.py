"""The kernel benchmark as JSON, Markdown and a plot."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from megatron_lightseq.kernels.cpu import CpuKernel
from megatron_lightseq.tools.bench.measure import ERROR_DRAWS, Row
from megatron_lightseq.tools.markdown import markdown_table
from megatron_lightseq.tools.provenance import processor, versions

HEADER = ("case", "forward", "backward", "of peak", "forward + backward", "error", "torch's error")
NAME = "cpu-kernel"


def machine() -> dict[str, str | int]:
    """Machine and versions of the measurement."""
    return {
        "cpu": processor(),
        "isa": CpuKernel().isa,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def cells(row: Row) -> list[str]:
    """A row of the table: torch's figures, ours, and their ratios."""
    ours, torchs = row.timings

    def speed(attribute: str) -> str:
        ratio = row.ratio(f"{attribute}_s")
        theirs, mine = getattr(torchs, f"{attribute}_gflops"), getattr(ours, f"{attribute}_gflops")
        return f"{theirs:.0f} -> {mine:.0f} ({ratio:.2f}x)"

    of_peak = f"{ours.forward_gflops / row.peak_gflops:.0%} / {ours.backward_gflops / row.peak_gflops:.0%}"
    worst = [f"{max(timing.errors.values()):.1e}" for timing in row.timings]
    return [
        str(row.case),
        speed("forward"),
        speed("backward"),
        of_peak,
        f"{row.ratio('total_s'):.2f}x",
        *worst,
    ]


def caption(repetitions: int) -> str:
    """How to read the table, and where it was measured."""
    here = machine()
    clock = "thread CPU time" if here["threads"] == 1 else "wall clock"
    pages = "huge pages" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else "small pages"
    return (
        f"GFLOP/s of useful operations, torch -> ours (ratio). Measured on {here['cpu']}, variant {here['isa']}, "
        f"{here['threads']} thread(s), {here['versions']}: {clock}, measured alternately, median of "
        f"{repetitions}, tensors of 2 MiB and more in {pages} (THP_MEM_ALLOC_ENABLE). Of peak: our forward / backward "
        "relative to products of registers only. Errors: the largest of out, dq, dk and dv against fp64, relative to "
        f"the largest value, with at most 1024 tokens; median over {ERROR_DRAWS} random inputs."
    )


def write_reports(rows: Sequence[Row], folder: Path, repetitions: int) -> list[Path]:
    """Write NAME.json, NAME.md and NAME.png; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{NAME}.{suffix}" for suffix in ("json", "md", "png")]
    records = [_record(row) for row in rows]
    paths[0].write_text(
        json.dumps({"machine": machine(), "repetitions": repetitions, "rows": records}, indent=1) + "\n"
    )
    paths[1].write_text(f"{markdown_table(HEADER, map(cells, rows))}\n\n{caption(repetitions)}\n")
    plot(rows, paths[2])
    return paths


def _record(row: Row) -> dict[str, object]:
    case = asdict(row.case) | {"dtype": str(row.case.dtype).removeprefix("torch.")}
    return {
        "case": case,
        "peak_gflops": row.peak_gflops,
        "timings": [asdict(timing) for timing in row.timings],
    }


def plot(rows: Sequence[Row], path: Path) -> None:
    """Bars of GFLOP/s for torch and ours, forward and backward, with the measured peak of each case."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.2 + 0.34 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    positions = range(len(rows))
    for axes, direction in zip(figure.subplots(1, 2, sharey=True), ("forward", "backward"), strict=True):
        for shift, which, colour in ((-0.2, 1, "#b0b0b0"), (0.2, 0, "#1f6fb4")):
            speeds = [getattr(row.timings[which], f"{direction}_gflops") for row in rows]
            label = "torch SDPA" if which else "megatron_lightseq"
            axes.barh([p + shift for p in positions], speeds, height=0.4, color=colour, label=label)
        peaks = [row.peak_gflops for row in rows]
        axes.scatter(peaks, positions, marker="|", s=160, color="black", label="measured peak")
        axes.set_xscale("log")
        axes.set_xlabel(f"{direction}, useful GFLOP/s")
        axes.set_yticks(positions, [str(row.case) for row in rows], fontsize=8)
    axes.invert_yaxis()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=120)
