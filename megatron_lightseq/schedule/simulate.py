"""Predicts what a schedule costs on a described cluster.

The model: a rank begins a step when it has finished the previous step and has received everything that was sent to
it in that step. The kernels and transfers of a step run concurrently, or one after the other without overlap. How
long the transfers of a step take is computed in network.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_lightseq.schedule.ir import OF_TOKENS, Payload, Step
from megatron_lightseq.schedule.network import Network, transfer_times
from megatron_lightseq.schedule.problem import TileAreas
from megatron_lightseq.schedule.schedule import Schedule
from megatron_lightseq.schedule.shape import TensorShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """How long work and transfers take. By default communication is free, and one rank's queries against one rank's
    keys take a second.
    """

    seconds_per_pair: float | None = None
    """Kernel time of one allowed (query, key) pair, over all heads; None for 1 / (tokens per rank)^2."""
    network: Network | None = None
    """What transfers run over; None if they are free."""
    overlap: bool = True
    """Whether transfers run concurrently with the kernels of their step."""


@dataclass(frozen=True, slots=True)
class Simulation:
    """What :func:`simulate` predicts. Times are in the unit of the :class:`Costs` that it was given."""

    makespan_s: float
    """From the first rank's start to the last rank's end."""
    ideal_s: float
    """The kernel time of all ranks divided by the number of ranks."""
    compute_s: tuple[float, ...]
    """Kernel time of each rank."""
    bytes_sent: tuple[int, ...]
    """By each rank."""
    bytes_received: tuple[int, ...]
    """By each rank."""
    steps: tuple[tuple[tuple[float, float, float], ...], ...]
    """``steps[t][rank]``: when the step began, when its kernels ended, and when its transfers had arrived."""

    @property
    def busy(self) -> float:
        """Fraction of the ranks' time spent in kernels."""
        return self.ideal_s / self.makespan_s if self.makespan_s else 1.0

    @property
    def exposed_s(self) -> float:
        """The longest time that any rank waited for transfers after its own kernels, summed over its steps."""
        waits = zip(
            *([max(0.0, arrived - computed) for _, computed, arrived in row] for row in self.steps),
            strict=True,
        )
        return max((sum(rank) for rank in waits), default=0.0)


@dataclass(frozen=True, slots=True)
class Profile:
    """The work and traffic of a schedule, step by step, without the identities of tiles and chunks: all that a
    simulation needs, in less memory.
    """

    cp_size: int
    shard_length: float
    """Tokens per rank."""
    steps: tuple[tuple[tuple[int, ...], tuple[tuple[Payload, int, int, int], ...]], ...]
    """For each step: allowed pairs by rank, and (payload, source, destination, tokens) of its transfers."""

    @staticmethod
    def of(schedule: Schedule) -> Profile:
        """Count the work and the transfers of a schedule, step by step."""
        shard_length = schedule.seq_length / schedule.layout.cp_size
        return Profile.of_steps(schedule.steps, schedule.layout.cp_size, shard_length, schedule.areas)

    @staticmethod
    def of_steps(moments: Sequence[Step], cp_size: int, shard_length: float, areas: TileAreas) -> Profile:
        """The same for the steps of a schedule that need not be valid."""
        steps = []
        for step in moments:
            tokens: dict[tuple[Payload, int, int], int] = {}
            for payload, chunk, src, dst, chunks in step.moves:
                key = (payload, src, dst)
                tokens[key] = tokens.get(key, 0) + len(areas.positions(chunk, chunks))
            pairs = tuple(sum(map(areas, tiles)) for tiles in step.tiles)
            steps.append((pairs, tuple((*key, total) for key, total in tokens.items())))
        return Profile(cp_size, shard_length, tuple(steps))


def simulate(
    schedule: Schedule | Profile, costs: Costs | None = None, shape: TensorShape | None = None
) -> Simulation:
    """Predict how long ``schedule`` takes, when each rank computes, and how many bytes it transfers.

    Args:
        schedule: a schedule, or its profile.
        costs: speeds of kernels and links; default: free communication.
        shape: the attention inputs, for the bytes of each transfer; default: one head of 128.
    """
    profile = schedule if isinstance(schedule, Profile) else Profile.of(schedule)
    costs, shape = costs or Costs(), shape or TensorShape()
    size = profile.cp_size
    pair_s = costs.seconds_per_pair if costs.seconds_per_pair is not None else 1.0 / profile.shard_length**2
    per_token = {payload: shape.bytes_per_token(payload) for payload in OF_TOKENS}
    moments = (
        Moment(
            tuple(count * pair_s for count in pairs),
            tuple((src, dst, tokens * per_token[payload]) for payload, src, dst, tokens in transfers),
        )
        for pairs, transfers in profile.steps
    )
    return play(moments, size, costs.network, costs.overlap)


class Moment(NamedTuple):
    """One step, in seconds and bytes."""

    work_s: tuple[float, ...]
    """By rank."""
    messages: tuple[tuple[int, int, int], ...]
    """(source, destination, bytes)."""


def play(
    moments: Iterable[Moment],
    size: int,
    network: Network | None,
    overlap: bool = True,
    starts: Sequence[float] | None = None,
) -> Simulation:
    """The clock of every prediction: a rank begins a step when it finished the one before, and has what was sent to it.

    Args:
        moments: the steps.
        size: ranks.
        network: what messages travel over; None if they are free.
        overlap: whether messages travel while the ranks work.
        starts: when each rank begins the first step; default: all at 0.
    """
    clock, compute = list(starts or [0.0] * size), [0.0] * size
    sent, received = [0] * size, [0] * size
    rows = []
    for work, messages in moments:
        computed = [start + seconds for start, seconds in zip(clock, work, strict=True)]
        ready = clock if overlap else computed
        arrived = transfer_times(messages, ready, network) if network else list(ready)
        rows.append(tuple(zip(clock, computed, arrived, strict=True)))
        for src, dst, num_bytes in messages:
            sent[src] += num_bytes
            received[dst] += num_bytes
        compute = [total + seconds for total, seconds in zip(compute, work, strict=True)]
        clock = [max(ends) for ends in zip(computed, arrived, strict=True)]
    return Simulation(
        makespan_s=max(clock, default=0.0),
        ideal_s=sum(compute) / size,
        compute_s=tuple(compute),
        bytes_sent=tuple(sent),
        bytes_received=tuple(received),
        steps=tuple(rows),
    )
