"""What the cost model says about the executions of a trace, from what the ranks computed and sent in each step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from megatron_lightseq.schedule import Network
from megatron_lightseq.schedule.simulate import Moment, Simulation, play
from megatron_lightseq.training.tracing.times import ExecutionTimes, RankTimes


@dataclass(frozen=True, slots=True)
class Compared:
    """One execution on all of its ranks, measured and predicted."""

    kind: str
    inside: str
    world_ranks: tuple[int, ...]
    """Of the ranks that ran it, in the order of the schedule's ranks."""
    measured: tuple[ExecutionTimes, ...]
    """By rank."""
    predicted: Simulation
    """Its clock starts with 0 at :attr:`began`."""

    @property
    def began(self) -> float:
        """When the first rank began, in seconds."""
        return min(each.steps[0].began for each in self.measured)

    @property
    def seconds(self) -> float:
        """From the first rank's start to the last rank's end."""
        return max(each.steps[-1].ended for each in self.measured) - self.began

    @property
    def exposed_s(self) -> float:
        """The longest time that any rank waited for transfers after its kernels, summed over its steps."""
        return max(sum(step.ended - step.computed for step in each.steps) for each in self.measured)


def compare(ranks: Sequence[RankTimes], network: Network | None, *, overlap: bool = True) -> list[Compared]:
    """Every execution of the trace, with its prediction.

    Kernels are predicted at one rate for each kind of execution, the mean of the trace, and every rank begins when it
    did: what is predicted is how ranks wait for transfers and for each other.

    Args:
        ranks: of the world, in order.
        network: what transfers run over; None for free transfers.
        overlap: whether transfers ran concurrently with the kernels of their step.
    """
    rates = _seconds_per_pair(ranks)
    found = []
    for world_ranks, executions in _matched(ranks):
        size, kind = len(executions), executions[0].kind
        moments = [_moment(executions, t, rates[kind]) for t in range(len(executions[0].steps))]
        first = min(each.steps[0].began for each in executions)
        starts = [each.steps[0].began - first for each in executions]
        predicted = play(moments, size, network if size > 1 else None, overlap, starts)
        found.append(Compared(kind, executions[0].inside, world_ranks, tuple(executions), predicted))
    return found


def typical(compared: Sequence[Compared]) -> dict[str, Compared]:
    """For each kind, the execution whose duration is the median."""
    kinds: defaultdict[str, list[Compared]] = defaultdict(list)
    for each in compared:
        kinds[each.kind].append(each)
    return {
        kind: sorted(each, key=lambda one: one.seconds)[(len(each) - 1) // 2] for kind, each in kinds.items()
    }


def describe(compared: Sequence[Compared]) -> list[str]:
    """A line for each kind: medians of durations and waits, measured and predicted."""
    lines = []
    for kind in dict.fromkeys(each.kind for each in compared):
        these = [each for each in compared if each.kind == kind]
        measured, predicted, waits, predicted_waits = (
            1e3 * median(values)
            for values in zip(
                *(
                    (each.seconds, each.predicted.makespan_s, each.exposed_s, each.predicted.exposed_s)
                    for each in these
                ),
                strict=True,
            )
        )
        lines.append(
            f"{kind}: {measured:.2f} ms, predicted {predicted:.2f} ({predicted / measured - 1:+.0%}), of which waits "
            f"{waits:.2f}, predicted {predicted_waits:.2f}; medians of {len(these)}"
        )
    return lines


def _seconds_per_pair(ranks: Sequence[RankTimes]) -> dict[str, float]:
    """By kind of execution: time in kernels by allowed (query, key) pair; 0 where there are none."""
    seconds: defaultdict[str, float] = defaultdict(float)
    pairs: defaultdict[str, int] = defaultdict(int)
    for rank in ranks:
        for execution in rank.executions:
            seconds[execution.kind] += sum(step.kernel_s for step in execution.steps)
            pairs[execution.kind] += sum(step.pairs for step in execution.steps)
    return {kind: seconds[kind] / pairs[kind] if pairs[kind] else 0.0 for kind in seconds}


def _matched(ranks: Sequence[RankTimes]) -> list[tuple[tuple[int, ...], list[ExecutionTimes]]]:
    """The executions that belong together: the n-th of a group of ranks, on each of them."""
    by_group: defaultdict[tuple[int, ...], dict[int, list[ExecutionTimes]]] = defaultdict(dict)
    for each in ranks:
        for execution in each.executions:
            group = tuple(each.peers[rank] for rank in execution.ranks)
            by_group[group].setdefault(each.rank, []).append(execution)
    found = []
    for group, members in by_group.items():
        rows = [members.get(rank, []) for rank in group]
        found += [(group, list(executions)) for executions in zip(*rows, strict=False)]
    return found


def _moment(executions: Sequence[ExecutionTimes], t: int, pair_s: float) -> Moment:
    steps = [each.steps[t] for each in executions]
    messages = tuple((src, dst, num_bytes) for src, step in enumerate(steps) for dst, num_bytes in step.sends)
    return Moment(tuple(step.pairs * pair_s for step in steps), messages)
