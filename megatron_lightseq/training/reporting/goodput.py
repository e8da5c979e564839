"""Goodput: the part of a run's time that went into steps which still count, and where the rest went."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_lightseq.training.reporting.metrics import Attempt, Line, SaveMetrics, TrainMetrics
from megatron_lightseq.training.reporting.progress import duration


@dataclass(frozen=True, kw_only=True, slots=True)
class Goodput:
    """All in seconds. Time between two commands that continue one run is not counted: nothing ran then."""

    wall: float
    """From the start of each command's first process to the last line of its metrics."""
    useful: float
    """In steps that count, once each, and were not skipped."""
    start: float
    """From the start of a command to its first step."""
    save: float
    """In which training waited for a checkpoint."""
    restart: float
    """From the last sign of an attempt that failed to the first step of the next one."""
    replay: float
    """In steps that a later attempt had to repeat."""

    @property
    def share(self) -> float:
        """Useful time by all time."""
        return self.useful / self.wall if self.wall > 0 else 1.0

    @property
    def other(self) -> float:
        """The rest: evaluation, reports, skipped steps."""
        return max(0.0, self.wall - self.useful - self.start - self.save - self.restart - self.replay)

    def __str__(self) -> str:
        lost = {
            "start": self.start,
            "saving": self.save,
            "restarts": self.restart,
            "repeated steps": self.replay,
            "evaluation and other": self.other,
        }
        parts = [f"{name} {seconds / self.wall:.1%}" for name, seconds in lost.items() if self.wall > 0]
        return f"goodput {self.share:.1%} of {duration(self.wall)}: " + ", ".join(parts)


class _Ledger:
    """What has been seen of the file so far."""

    def __init__(self) -> None:
        self.wall = self.start = self.save = self.restart = self.replay = 0.0
        self.counted: dict[int, float] = {}
        """Useful seconds by step."""
        self._last: float | None = None
        """When the last line was written."""
        self._waiting: tuple[str, float] | None = None
        """Before the first step of an attempt: what that time is lost by, and since when."""

    def take(self, line: Line) -> None:
        value = line.value
        if isinstance(value, Attempt):
            self._begin(value, line.time)
        elif isinstance(value, TrainMetrics):
            self._step(value, line.time)
        elif isinstance(value, SaveMetrics):
            self.save += value.seconds
        if self._last is not None:
            self.wall += max(0.0, line.time - self._last)  # a clock that was set back tells nothing
        self._last = line.time

    def _begin(self, attempt: Attempt, now: float) -> None:
        for step in [step for step in self.counted if step > attempt.step]:
            self.replay += self.counted.pop(step)
        if attempt.began is None:
            return
        if attempt.restart > 0 and self._last is not None:
            self._waiting = ("restart", self._last)
        else:
            self._last = min(attempt.began, now)
            self._waiting = ("start", self._last)

    def _step(self, metrics: TrainMetrics, now: float) -> None:
        if self._waiting is not None:
            name, since = self._waiting
            setattr(self, name, getattr(self, name) + max(0.0, now - metrics.step_seconds - since))
            self._waiting = None
        if not metrics.skipped:
            self.counted[metrics.step] = metrics.step_seconds


def goodput(lines: Iterable[Line]) -> Goodput | None:
    """Of all attempts in a metrics file; None for files without attempts, such as those of earlier releases."""
    ledger, marked = _Ledger(), False
    for line in lines:
        if isinstance(line.value, Attempt):
            if line.value.step == 0 and line.value.restart == 0 and line.value.began is not None:
                ledger = _Ledger()  # a new run
            marked = True
        if marked:
            ledger.take(line)
    if not marked:
        return None
    return Goodput(
        wall=ledger.wall,
        useful=sum(ledger.counted.values()),
        start=ledger.start,
        save=ledger.save,
        restart=ledger.restart,
        replay=ledger.replay,
    )
