"""A rank's trace in seconds, as it travels to rank 0."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_lightseq.attention.trace import ExecutionRecord, Region, StepRecord, Trace


@dataclass(frozen=True, slots=True)
class Stretch:
    """Something that took from ``began`` to ``ended``, in seconds."""

    name: str
    began: float
    ended: float


@dataclass(frozen=True, slots=True)
class StepTimes:
    """One step of a schedule on one rank; see :class:`~megatron_lightseq.attention.trace.StepRecord`."""

    began: float
    computed: float
    ended: float
    pairs: int
    sends: tuple[tuple[int, int], ...]
    calls: tuple[Stretch, ...]

    @property
    def kernel_s(self) -> float:
        """Time in kernel calls."""
        return sum(call.ended - call.began for call in self.calls)


@dataclass(frozen=True, slots=True)
class ExecutionTimes:
    """One execution of a schedule on one rank; see :class:`~megatron_lightseq.attention.trace.ExecutionRecord`."""

    kind: str
    inside: str
    ranks: tuple[int, ...]
    steps: tuple[StepTimes, ...]


@dataclass(frozen=True, slots=True)
class RankTimes:
    """Everything that one rank recorded, on its host's clock."""

    rank: int
    """In the world."""
    peers: tuple[int, ...]
    """The ranks of its context-parallel group, in the world."""
    host: str
    latency_s: float
    """Measured between neighbours of the group; 0 on a single rank."""
    bytes_per_s: float
    regions: tuple[Stretch, ...]
    executions: tuple[ExecutionTimes, ...]

    def shifted(self, seconds: float) -> RankTimes:
        """The same on a clock that shows so many seconds more."""
        regions = tuple(_moved(region, seconds) for region in self.regions)
        executions = tuple(
            replace(each, steps=tuple(_moved_step(step, seconds) for step in each.steps))
            for each in self.executions
        )
        return replace(self, regions=regions, executions=executions)

    def to_json(self) -> str:
        """As text that :meth:`from_json` reads."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> RankTimes:
        """From :meth:`to_json`."""
        return _parsed(json.loads(text))


def read_trace(
    trace: Trace, *, rank: int, peers: Sequence[int], host: str, link: tuple[float, float]
) -> RankTimes:
    """Turn stamps into seconds. On CUDA this waits for the device.

    Args:
        trace: of this rank.
        rank, peers, host: as in :class:`RankTimes`.
        link: latency in seconds and bytes per second between neighbours.
    """
    stamps = list(_stamps(trace))
    times = iter(trace.clock.seconds(stamps))

    def stretch(region: Region) -> Stretch:
        return Stretch(region.name, next(times), next(times))

    def step(record: StepRecord) -> StepTimes:
        began, computed, ended = next(times), next(times), next(times)
        calls = tuple(stretch(call) for call in record.calls)
        return StepTimes(began, computed, ended, record.pairs, tuple(record.sends), calls)

    def execution(record: ExecutionRecord) -> ExecutionTimes:
        steps = tuple(step(each) for each in record.steps)
        return ExecutionTimes(record.kind, record.inside, record.ranks, steps)

    regions = tuple(stretch(region) for region in trace.regions)
    executions = tuple(execution(record) for record in trace.executions)
    return RankTimes(rank, tuple(peers), host, *link, regions, executions)


def _stamps(trace: Trace) -> Iterator[Any]:
    """All stamps, in the order in which :func:`read_trace` takes their times."""
    for region in trace.regions:
        yield from (region.began, region.ended)
    for record in trace.executions:
        for step in record.steps:
            yield from (step.began, step.computed, step.ended)
            for call in step.calls:
                yield from (call.began, call.ended)


def _parsed(fields: dict[str, Any]) -> RankTimes:
    fields["peers"] = tuple(fields["peers"])
    fields["regions"] = tuple(Stretch(**each) for each in fields["regions"])
    fields["executions"] = tuple(_parsed_execution(each) for each in fields["executions"])
    return RankTimes(**fields)


def _parsed_execution(fields: dict[str, Any]) -> ExecutionTimes:
    steps = []
    for step in fields["steps"]:
        step["sends"] = tuple((peer, num_bytes) for peer, num_bytes in step["sends"])
        step["calls"] = tuple(Stretch(**call) for call in step["calls"])
        steps.append(StepTimes(**step))
    return ExecutionTimes(fields["kind"], fields["inside"], tuple(fields["ranks"]), tuple(steps))


def _moved(stretch: Stretch, seconds: float) -> Stretch:
    return replace(stretch, began=stretch.began + seconds, ended=stretch.ended + seconds)


def _moved_step(step: StepTimes, seconds: float) -> StepTimes:
    began, computed, ended = (at + seconds for at in (step.began, step.computed, step.ended))
    calls = tuple(_moved(call, seconds) for call in step.calls)
    return replace(step, began=began, computed=computed, ended=ended, calls=calls)
