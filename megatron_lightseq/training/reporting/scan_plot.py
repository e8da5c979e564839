"""Draws scans: which rank folds what in which step, and the states and maps that travel meanwhile."""

from __future__ import annotations

from pathlib import Path

from megatron_lightseq.schedule.ir import Payload
from megatron_lightseq.schedule.scan import Scan

_COLOURS = {Payload.STATE: "#2a6fbb", Payload.MAP: "#b4652a"}


def draw_scan(scan: Scan, path: Path | str) -> None:
    """Draw a scan: a lane for every rank, a column for every step, boxes for folds, arrows for transfers.

    An arrow begins in the step in which it travels, and ends before the one in which what it carries can be used.

    Args:
        scan: any scan.
        path: PNG file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size, steps = scan.layout.cp_size, len(scan.steps)
    figure = Figure(figsize=(2.5 + 1.6 * steps, 1.6 + 0.5 * size), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    box = {"boxstyle": "round", "fc": "white"}
    for t, step in enumerate(scan.steps):
        for move in step.moves:
            style = {"arrowstyle": "->", "color": _COLOURS[move.payload], "alpha": 0.8}
            axes.annotate("", xy=(t + 0.8, move.dst), xytext=(t + 0.2, move.src), arrowprops=style)
        for rank, folds in enumerate(step.folds):
            if folds:
                axes.text(t, rank, "\n".join(map(str, folds)), ha="center", va="center", size=8, bbox=box)
    for payload, colour in _COLOURS.items():
        axes.plot([], [], color=colour, label=payload.name.lower())
    axes.set(xlim=(-0.5, steps + 0.3), ylim=(size - 0.5, -0.5), xlabel="step", ylabel="rank")
    axes.set(
        xticks=range(steps), yticks=range(size), title=f"{scan.method} scan, {scan.direction}, {scan.layout}"
    )
    axes.legend(loc="upper right", frameon=False)
    figure.savefig(path, dpi=150)
