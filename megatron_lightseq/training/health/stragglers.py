"""Ranks that compute for longer than the others, which wait for them in every step."""

from __future__ import annotations

import socket
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from megatron_lightseq.schedule import Direction, simulate
from megatron_lightseq.training.setup import Training
from megatron_lightseq.transport.group import rank_in

WINDOW_STEPS = 16
"""A rank is judged by the median over so many steps: half of them must be slow."""
LEAST_S = 0.01
"""Of a step; less is not worth a report."""
LEAST_SHARE = 0.1
"""Of the step's time that the others must have to wait for the rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """What is known of a rank's work before it begins."""

    host: str
    stage: int
    """Of the pipeline: ranks are compared with those of their stage, if it has others."""
    share: float
    """Of the attention of its context parallel group; ranks of an unbalanced schedule have different ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Straggler:
    """A rank that has become slow, or has been from the beginning."""

    rank: int
    host: str
    seconds: float
    """Its own work in a step: the median."""
    others: float
    """The same of the median rank among the others."""

    def __str__(self) -> str:
        return (
            f"rank {self.rank} on {self.host} works {1000 * self.seconds:.0f} ms in a step, "
            f"{self.seconds / self.others:.1f} times as long as "
            f"the median of the other ranks ({1000 * self.others:.0f} ms), which wait for it"
        )


class StragglerWatch:
    """Judges the ranks after every step; all ranks that are given the same times come to the same judgement.

    Args:
        places: of each rank.
        factor: a straggler takes this many times as long as the others, after the difference that is expected.
    """

    def __init__(self, places: Sequence[Place], factor: float) -> None:
        self._places = places
        self._factor = factor
        self._windows: list[deque[float]] = [deque(maxlen=WINDOW_STEPS) for _ in places]
        self._steps: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._known: set[int] = set()

    def add(self, busy: Sequence[float], step_s: float) -> list[Straggler]:
        """Take in a step: each rank's seconds of work, and the step's time. Returns ranks that are newly slow."""
        for window, seconds in zip(self._windows, busy, strict=True):
            window.append(seconds)
        self._steps.append(step_s)
        if len(self._steps) < WINDOW_STEPS or len(self._windows) == 1:
            return []
        work = [statistics.median(window) for window in self._windows]
        found = [self._judge(rank, work, statistics.median(self._steps)) for rank in self._suspects(work)]
        slow = [straggler for straggler in found if straggler is not None]
        new = [straggler for straggler in slow if straggler.rank not in self._known]
        self._known = {straggler.rank for straggler in slow}
        return new

    def _suspects(self, work: Sequence[float]) -> list[int]:
        """Ranks above the mean, without the cost of judging all of a large job in every step."""
        mean = statistics.fmean(work)
        return [rank for rank, seconds in enumerate(work) if seconds > mean]

    def _judge(self, rank: int, work: Sequence[float], step_s: float) -> Straggler | None:
        own = self._places[rank]
        others_of = [other for other in range(len(work)) if other != rank]
        same_stage = [other for other in others_of if self._places[other].stage == own.stage]
        others = statistics.median(
            work[other] * max(1.0, own.share / self._places[other].share) for other in same_stage or others_of
        )
        excess = work[rank] - others
        if work[rank] <= self._factor * others or excess < max(LEAST_S, LEAST_SHARE * step_s):
            return None
        return Straggler(rank=rank, host=own.host, seconds=work[rank], others=others)


def watch_ranks(training: Training) -> StragglerWatch | None:
    """For the ranks of a run; None if it is not to look. Collective."""
    factor = training.config.health.straggler_factor
    if factor is None or dist.get_world_size() == 1:
        return None
    own = Place(host=socket.gethostname(), stage=rank_in(training.groups.pp), share=_share(training))
    places: list[Place] = [own] * dist.get_world_size()
    dist.all_gather_object(places, own)
    return StragglerWatch(places, factor)


def _share(training: Training) -> float:
    """This rank's part of the attention that its layers compute, over all kinds of layers."""
    attention, rank = training.resolved.attention, rank_in(training.groups.cp)
    if attention is None:
        return 1.0
    own = total = 0.0
    for kind in attention.kinds:
        for direction in Direction:
            seconds = simulate(kind.schedules.schedule(direction)).compute_s
            own += len(kind.layers) * seconds[rank]
            total += len(kind.layers) * sum(seconds)
    return max(own / total, 1e-6) if total else 1.0
