"""What attention did when: the steps of every schedule that ran, for a while, on one rank.

Recording costs a few readings of a clock per step. On CUDA, events on the stream stand in for readings, and become
times when the trace is read.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

Stamp = Any
"""A moment, in the form of the clock that it was read from."""


class Clock(Protocol):
    """A source of stamps."""

    def now(self) -> Stamp:
        """The present moment."""

    def seconds(self, stamps: Sequence[Stamp]) -> list[float]:
        """Times of stamps, in seconds on the host's monotonic clock (:func:`time.perf_counter`)."""


class HostClock:
    """Of the host, for kernels that have ended when they return."""

    def now(self) -> float:
        """As in :class:`Clock`."""
        return time.perf_counter()

    def seconds(self, stamps: Sequence[float]) -> list[float]:
        """As in :class:`Clock`."""
        return list(stamps)


class CudaClock:
    """Of the current CUDA stream: when the work before a stamp was done."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self._first = self.now()
        torch.cuda.synchronize()
        self._first_s = time.perf_counter()

    def now(self) -> torch.cuda.Event:
        """As in :class:`Clock`."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, stamps: Sequence[torch.cuda.Event]) -> list[float]:
        """As in :class:`Clock`; waits for the device."""
        torch.cuda.synchronize()
        return [self._first_s + self._first.elapsed_time(stamp) / 1e3 for stamp in stamps]


def clock_of(device: torch.device) -> Clock:
    """The clock of a device's work."""
    return CudaClock() if device.type == "cuda" else HostClock()


@dataclass(frozen=True, slots=True)
class Region:
    """A named stretch of time."""

    name: str
    began: Stamp
    ended: Stamp


@dataclass(slots=True)
class StepRecord:
    """One step of an execution."""

    began: Stamp
    computed: Stamp = None
    """When its kernel calls were done."""
    ended: Stamp = None
    """When its transfers had arrived and were taken in."""
    pairs: int = 0
    """Allowed (query, key) pairs of its kernel calls; of a scan, 0."""
    sends: list[tuple[int, int]] = field(default_factory=list)
    """(peer, bytes), peers as numbered in the group of the execution."""
    calls: list[Region] = field(default_factory=list)
    """Its kernel calls."""


@dataclass(slots=True)
class ExecutionRecord:
    """One execution of a schedule: attention of one layer and micro-batch in one direction."""

    kind: str
    """``forward``, ``backward``, or such a scan of states."""
    inside: str
    """Its layer, or else the innermost region in which it ran; empty if there was neither."""
    ranks: tuple[int, ...]
    """The ranks that run it together, as numbered in the context-parallel group."""
    steps: list[StepRecord] = field(default_factory=list)


class Trace:
    """Records regions and executions of schedules on this rank, in the order in which they begin."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.executions: list[ExecutionRecord] = []
        self.regions: list[Region] = []
        self._open: list[tuple[str, Stamp]] = []

    @contextmanager
    def region(self, name: str) -> Iterator[None]:
        """A context that is a region."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave(name)

    def enter(self, name: str) -> None:
        """Begin a region."""
        self._open.append((name, self.clock.now()))

    def leave(self, name: str) -> None:
        """End the innermost open region of that name; without one, nothing happens."""
        for index in range(len(self._open) - 1, -1, -1):
            if self._open[index][0] == name:
                _, began = self._open.pop(index)
                self.regions.append(Region(name, began, self.clock.now()))
                return

    def execution(self, kind: str, ranks: tuple[int, ...], layer: int = 0) -> Marks:
        """Begin a record, to which the runtime adds its steps; layer 0 is none that has a number."""
        innermost = self._open[-1][0] if self._open else ""
        record = ExecutionRecord(kind, f"layer {layer}" if layer else innermost, ranks)
        self.executions.append(record)
        return _Recording(self.clock, record)


class Outgoing(Protocol):
    """A transfer that a step starts."""

    @property
    def peer(self) -> int:
        """The rank that gets it, as numbered in the group of the execution."""

    @property
    def bundle(self) -> tuple[torch.Tensor, ...]:
        """What travels."""


class Marks(Protocol):
    """What the runtime tells while it executes a schedule."""

    def step(self, outgoing: Sequence[Outgoing]) -> None:
        """A step begins, which sends these."""

    def started(self) -> None:
        """Its transfers have been started; kernel calls follow."""

    def call(self, queries: range, keys: range, pairs: int) -> None:
        """A kernel call over these positions has been made."""

    def computed(self) -> None:
        """The calls of the step have been made."""

    def ended(self) -> None:
        """Its transfers have arrived and were taken in."""


class NoMarks:
    """Tells nobody."""

    def step(self, outgoing: Sequence[Outgoing]) -> None:
        """Nothing."""

    def started(self) -> None:
        """Nothing."""

    def call(self, queries: range, keys: range, pairs: int) -> None:
        """Nothing."""

    def computed(self) -> None:
        """Nothing."""

    def ended(self) -> None:
        """Nothing."""


class _Recording:
    """Tells a trace."""

    def __init__(self, clock: Clock, record: ExecutionRecord) -> None:
        self._clock, self._steps = clock, record.steps
        self._last: Stamp = None

    def step(self, outgoing: Sequence[Outgoing]) -> None:
        sends = [(each.peer, sum(part.nbytes for part in each.bundle)) for each in outgoing]
        self._steps.append(StepRecord(self._clock.now(), sends=sends))

    def started(self) -> None:
        self._last = self._clock.now()

    def call(self, queries: range, keys: range, pairs: int) -> None:
        now, step = self._clock.now(), self._steps[-1]
        step.calls.append(Region(f"q {_shown(queries)}, k {_shown(keys)}", self._last, now))
        step.pairs += pairs
        self._last = now

    def computed(self) -> None:
        self._steps[-1].computed = self._clock.now()

    def ended(self) -> None:
        self._steps[-1].ended = self._clock.now()


def _shown(positions: range) -> str:
    stride = f" by {positions.step}" if positions.step > 1 else ""
    return f"{positions.start}-{positions[-1]}{stride}"
