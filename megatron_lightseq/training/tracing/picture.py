"""Draws attention as it ran beside attention as it was predicted, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from megatron_lightseq.training.tracing.predict import Compared

_MEASURED, _PREDICTED, _WAIT = ("#1f5fa8", "#6f9fd3"), ("#c2571a", "#e3a17c"), "#e7e9ee"
_HEIGHT = 0.36
"""Of a bar; the ranks are 1 apart."""


def draw_trace(typical: Mapping[str, Compared], path: Path | str) -> None:
    """Draw one execution of every kind: for every rank, its measured steps above its predicted ones.

    Args:
        typical: the executions by their kinds.
        path: PNG file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    heights = [1.1 + 0.5 * len(each.measured) for each in typical.values()]
    figure = Figure(figsize=(10, 0.6 + sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(typical), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, (kind, compared) in zip(rows, typical.items(), strict=True):
        _draw(axes, kind, compared)
    rows[-1].set_xlabel("milliseconds since the first rank began")
    handles = [
        Patch(facecolor=_MEASURED[0], label="kernels, measured"),
        Patch(facecolor=_PREDICTED[0], label="kernels, predicted"),
        Patch(facecolor=_WAIT, edgecolor="#7a8290", label="waiting for transfers"),
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _draw(axes: Axes, kind: str, compared: Compared) -> None:
    for index, execution in enumerate(compared.measured):
        for t, step in enumerate(execution.steps):
            began, computed, ended = (
                1e3 * (at - compared.began) for at in (step.began, step.computed, step.ended)
            )
            _bar(axes, index - _HEIGHT / 2, t, (began, computed, ended), _MEASURED)
        for t, row in enumerate(compared.predicted.steps):
            began, computed, arrived = (1e3 * at for at in row[index])
            _bar(axes, index + _HEIGHT / 2, t, (began, computed, max(computed, arrived)), _PREDICTED)
    size = len(compared.measured)
    axes.set_yticks(range(size), [f"rank {rank}" for rank in compared.world_ranks])
    axes.set_ylim(size - 0.5, -0.5)
    measured, predicted = 1e3 * compared.seconds, 1e3 * compared.predicted.makespan_s
    axes.set_title(
        f"{kind}: {measured:.2f} ms, predicted {predicted:.2f} ms", loc="left", fontsize=11, fontweight="bold"
    )
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _bar(
    axes: Axes, lane: float, t: int, times: tuple[float, float, float], colours: tuple[Any, Any]
) -> None:
    began, computed, ended = times
    axes.barh(
        lane, ended - computed, left=computed, height=_HEIGHT, color=_WAIT, edgecolor="#7a8290", linewidth=0.4
    )
    axes.barh(lane, computed - began, left=began, height=_HEIGHT, color=colours[t % 2], linewidth=0)
    axes.text(began, lane, f" {t}", va="center", fontsize=7, color="white", clip_on=True)
