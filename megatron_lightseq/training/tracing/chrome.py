"""A trace in the Trace Event Format, which Perfetto (ui.perfetto.dev) and chrome://tracing show.

Every rank is a process with four lanes: Megatron's regions, the steps of attention's schedules with their kernel calls
and waits, their transfers, and the same steps as predicted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_lightseq.training.tracing.predict import Compared
from megatron_lightseq.training.tracing.times import ExecutionTimes, RankTimes, StepTimes

REGIONS, STEPS, TRANSFERS, PREDICTED = range(4)
_LANES = {
    REGIONS: "Megatron",
    STEPS: "attention, measured",
    TRANSFERS: "transfers",
    PREDICTED: "attention, predicted",
}

Event = dict[str, Any]


def write(path: Path, ranks: Sequence[RankTimes], compared: Sequence[Compared]) -> None:
    """Write all ranks into one file.

    Args:
        path: a ``.json`` file.
        ranks: of the world, on one clock.
        compared: from :func:`predict.compare`.
    """
    events = [*_names(ranks)]
    for rank in ranks:
        events += _measured(rank)
    lanes = _FreeLanes()
    for each in sorted(compared, key=lambda each: each.began):
        events += _predicted(each, lanes)
    first = min((event["ts"] for event in events if "ts" in event), default=0.0)
    for event in events:
        if "ts" in event:
            event["ts"] = round(event["ts"] - first, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"traceEvents": events, "displayTimeUnit": "ms"}
    path.write_text(json.dumps(document, separators=(",", ":")) + "\n", encoding="utf-8")


def _names(ranks: Sequence[RankTimes]) -> Iterator[Event]:
    for rank in ranks:
        name = f"rank {rank.rank}" + (f" on {rank.host.split()[0]}" if rank.host else "")
        yield {"ph": "M", "name": "process_name", "pid": rank.rank, "args": {"name": name}}
        yield {"ph": "M", "name": "process_sort_index", "pid": rank.rank, "args": {"sort_index": rank.rank}}
        for lane, label in _LANES.items():
            yield {"ph": "M", "name": "thread_name", "pid": rank.rank, "tid": lane, "args": {"name": label}}
            yield {
                "ph": "M",
                "name": "thread_sort_index",
                "pid": rank.rank,
                "tid": lane,
                "args": {"sort_index": lane},
            }


def _measured(rank: RankTimes) -> Iterator[Event]:
    for region in rank.regions:
        yield _event(rank.rank, REGIONS, region.name, region.began, region.ended)
    for execution in rank.executions:
        yield _event(rank.rank, STEPS, _title(execution), execution.steps[0].began, execution.steps[-1].ended)
        for t, step in enumerate(execution.steps):
            yield from _step(rank, execution, t, step)


def _step(rank: RankTimes, execution: ExecutionTimes, t: int, step: StepTimes) -> Iterator[Event]:
    yield _event(rank.rank, STEPS, f"step {t}", step.began, step.ended, pairs=step.pairs)
    for call in step.calls:
        yield _event(rank.rank, STEPS, call.name, call.began, call.ended)
    yield _event(rank.rank, STEPS, "wait", step.computed, step.ended)
    for peer, num_bytes in step.sends:
        to = rank.peers[execution.ranks[peer]]
        name = f"{execution.kind} step {t} to rank {to}"
        yield _event(rank.rank, TRANSFERS, name, step.began, step.ended, bytes=num_bytes)


class _FreeLanes:
    """Lanes for predictions: one that takes longer than what was measured may overlap the next one."""

    def __init__(self) -> None:
        self._free_from: dict[int, list[float]] = {}

    def take(self, rank: int, began: float, ended: float) -> int:
        """The first lane of a rank that is free then."""
        lanes = self._free_from.setdefault(rank, [])
        number = next((n for n, free in enumerate(lanes) if free <= began), len(lanes))
        lanes[number : number + 1] = [ended]
        return PREDICTED + number


def _predicted(compared: Compared, lanes: _FreeLanes) -> Iterator[Event]:
    start = compared.began
    for index, rank in enumerate(compared.world_ranks):
        rows = [row[index] for row in compared.predicted.steps]
        began, ended = start + rows[0][0], start + max(rows[-1])
        lane = lanes.take(rank, began, ended)
        yield _event(rank, lane, _title(compared.measured[index]), began, ended)
        for t, (begins, computed, arrived) in enumerate(rows):
            yield _event(rank, lane, f"step {t}", start + begins, start + max(computed, arrived))
            if arrived > computed:
                yield _event(rank, lane, "wait", start + computed, start + arrived)


def _title(execution: ExecutionTimes) -> str:
    return execution.kind + (f" in {execution.inside}" if execution.inside else "")


def _event(pid: int, tid: int, name: str, began: float, ended: float, **details: Any) -> Event:
    event: Event = {"ph": "X", "name": name, "pid": pid, "tid": tid, "ts": 1e6 * began}
    event["dur"] = round(max(1e6 * (ended - began), 0.0), 3)
    return event | ({"args": details} if details else {})
