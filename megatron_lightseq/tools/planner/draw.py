"""A plan as a picture: memory of every pipeline stage, and one step's timeline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_lightseq.tools.planner.cluster import GIB
from megatron_lightseq.tools.planner.cost import StepTime
from megatron_lightseq.tools.planner.footprint import ALLOCATOR, LIBRARIES, Footprint
from megatron_lightseq.tools.planner.purposes import PURPOSES

_FORWARD, _BACKWARD, _END = "#4c78a8", "#e45756", "#72b7b2"
_BACKWARD_SHARE = 2 / 3
_MAX_MICRO_BATCHES = 16
"""Micro-batches in the timeline; more look like the last ones."""


@dataclass(frozen=True, slots=True)
class Span:
    """Work of one stage on one micro-batch."""

    stage: int
    start: float
    seconds: float
    backward: bool


def draw_plan(found: Footprint, time: StepTime, micro_batches: int, title: str, path: Path) -> None:
    """Write the picture; the format follows from the file's name."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    memory, timeline = figure.subplots(1, 2, width_ratios=(2, 3))
    figure.suptitle(title)
    _draw_memory(memory, found)
    _draw_timeline(timeline, time, len(found.stages), micro_batches)
    figure.savefig(path, dpi=120)


def _draw_memory(axes: Any, found: Footprint) -> None:
    numbers = [str(stage.number) for stage in found.stages]
    bottoms = [0.0] * len(numbers)
    for purpose in (*PURPOSES, ALLOCATOR, LIBRARIES):
        heights = [stage.holdings.get(purpose, 0) / GIB for stage in found.stages]
        if max(heights) > 0.01 * found.capacity_bytes / GIB:
            axes.bar(numbers, heights, bottom=bottoms, label=purpose, width=0.6)
            bottoms = [low + height for low, height in zip(bottoms, heights, strict=True)]
    axes.axhline(found.capacity_bytes / GIB, color="black", linestyle="--", linewidth=1)
    axes.set(xlabel="pipeline stage", ylabel="GiB of its fullest rank")
    axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(0, -0.15), ncols=2)


def _draw_timeline(axes: Any, time: StepTime, stages: int, micro_batches: int) -> None:
    shown = min(micro_batches, _MAX_MICRO_BATCHES)
    after = time.data_transfers + time.optimizer
    one = (time.seconds - time.bubble - after) / micro_batches
    spans = pipeline_spans(stages, shown, one)
    for span in spans:
        axes.barh(
            span.stage,
            span.seconds,
            left=span.start,
            color=_BACKWARD if span.backward else _FORWARD,
            edgecolor="white",
            linewidth=0.5,
        )
    end = max(span.start + span.seconds for span in spans)
    axes.barh(range(stages), [after] * stages, left=end, color=_END)
    axes.invert_yaxis()
    left_out = f", {shown} of {micro_batches} micro-batches" if shown < micro_batches else ""
    axes.set(
        xlabel=f"seconds (forward, backward, update{left_out})", ylabel="pipeline stage", yticks=range(stages)
    )
    axes.set_title(f"{time.seconds:.2f} s per step, {time.tokens_per_s:,.0f} tokens/s", fontsize="medium")


def pipeline_spans(stages: int, micro_batches: int, one: float) -> list[Span]:
    """One forward, one backward (1F1B): when every stage works on which micro-batch.

    Args:
        stages: of the pipeline.
        micro_batches: of one step.
        one: seconds of a micro-batch on a stage, forward and backward.
    """
    forward, backward = (1 - _BACKWARD_SHARE) * one, _BACKWARD_SHARE * one
    done: dict[tuple[int, int, bool], float] = {}
    spans: list[Span] = []
    queues = {stage: _order(stage, stages, micro_batches) for stage in range(stages)}
    clock = [0.0] * stages
    while any(queues.values()):
        for stage, queue in queues.items():
            while queue:
                number, is_backward = queue[0]
                ready = _ready(done, stage, stages, number, is_backward)
                if ready is None:
                    break
                queue.pop(0)
                start, seconds = max(clock[stage], ready), backward if is_backward else forward
                clock[stage] = done[stage, number, is_backward] = start + seconds
                spans.append(Span(stage, start, seconds, is_backward))
    return spans


def _order(stage: int, stages: int, micro_batches: int) -> list[tuple[int, bool]]:
    ahead = min(stages - stage - 1, micro_batches)
    order = [(number, False) for number in range(ahead)]
    for number in range(micro_batches - ahead):
        order += [(ahead + number, False), (number, True)]
    return order + [(number, True) for number in range(micro_batches - ahead, micro_batches)]


def _ready(
    done: dict[tuple[int, int, bool], float], stage: int, stages: int, number: int, is_backward: bool
) -> float | None:
    """When the input of this work is there; None if it is not known yet."""
    if is_backward:
        return (
            done.get((stage, number, False)) if stage == stages - 1 else done.get((stage + 1, number, True))
        )
    return 0.0 if stage == 0 else done.get((stage - 1, number, False))
