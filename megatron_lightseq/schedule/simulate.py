"""Predicts what a schedule costs on a cluster that need not be here.

The model: a rank begins a step when it has finished the step before and has everything that was sent to it then.
Kernels and transfers of one step run side by side, or one after the other without overlap. How long the transfers
of a step take is the network's business (network.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lightseq.schedule.ir import Payload
from megatron_lightseq.schedule.network import Network, transfer_times
from megatron_lightseq.schedule.schedule import Schedule
from megatron_lightseq.schedule.shape import TensorShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What work and transfers take. The defaults make communication free and one chunk-by-chunk tile one second."""

    seconds_per_pair: float | None = None
    """Kernel time of one allowed (query, key) pair, over all heads; None for 1 / (tokens a rank holds)^2."""
    network: Network | None = None
    """What transfers run over; None makes them free."""
    overlap: bool = True
    """Whether transfers run beside the kernels of their step."""


@dataclass(frozen=True, slots=True)
class Simulation:
    """What :func:`simulate` predicts. Seconds are in the unit that :class:`Costs` was given in."""

    makespan_s: float
    """From the first rank's start to the last rank's end."""
    ideal_s: float
    """All work divided by the number of ranks."""
    compute_s: tuple[float, ...]
    """Kernel time of each rank."""
    bytes_sent: tuple[int, ...]
    bytes_received: tuple[int, ...]
    steps: tuple[tuple[tuple[float, float, float], ...], ...]
    """``steps[t][rank]``: when the step began, when its kernels ended, when its transfers had arrived."""

    @property
    def busy(self) -> float:
        """Fraction of the ranks' time spent in kernels."""
        return self.ideal_s / self.makespan_s if self.makespan_s else 1.0

    @property
    def exposed_s(self) -> float:
        """The longest time that any rank waited for transfers after its own kernels, over all steps."""
        waits = zip(
            *([max(0.0, arrived - computed) for _, computed, arrived in row] for row in self.steps),
            strict=True,
        )
        return max((sum(rank) for rank in waits), default=0.0)


@dataclass(frozen=True, slots=True)
class Profile:
    """What a schedule costs anywhere: its steps without the identity of tiles and chunks. Small, and quick to play."""

    cp_size: int
    shard_length: float
    """Tokens of a rank."""
    steps: tuple[tuple[tuple[int, ...], tuple[tuple[Payload, int, int, int], ...]], ...]
    """For each step: allowed pairs by rank; and (payload, source, destination, tokens) of all that travels."""

    @staticmethod
    def of(schedule: Schedule) -> Profile:
        """Count a schedule's work and its transfers, step by step."""
        layout, work = schedule.layout, schedule.work
        lengths = [len(layout.chunk_positions(c, schedule.seq_length)) for c in range(layout.num_chunks)]
        steps = []
        for step in schedule.steps:
            tokens: dict[tuple[Payload, int, int], int] = {}
            for payload, chunk, src, dst in step.moves:
                key = (payload, src, dst)
                tokens[key] = tokens.get(key, 0) + lengths[chunk]
            pairs = tuple(sum(work[tile] for tile in tiles) for tiles in step.tiles)
            steps.append((pairs, tuple((*key, total) for key, total in tokens.items())))
        return Profile(layout.cp_size, schedule.seq_length / layout.cp_size, tuple(steps))


def simulate(
    schedule: Schedule | Profile, costs: Costs | None = None, shape: TensorShape | None = None
) -> Simulation:
    """Play ``schedule`` against a clock.

    Args:
        schedule: what to play, or the profile that was made of it.
        costs: kernel and link speeds; default: free communication.
        shape: for the bytes of each transfer; default: one head of 128.
    """
    profile = schedule if isinstance(schedule, Profile) else Profile.of(schedule)
    costs, shape = costs or Costs(), shape or TensorShape()
    size = profile.cp_size
    pair_s = costs.seconds_per_pair if costs.seconds_per_pair is not None else 1.0 / profile.shard_length**2
    per_token = {payload: shape.bytes_per_token(payload) for payload in Payload}

    clock, compute = [0.0] * size, [0.0] * size
    sent, received = [0] * size, [0] * size
    rows = []
    for pairs, transfers in profile.steps:
        work = [count * pair_s for count in pairs]
        computed = [start + seconds for start, seconds in zip(clock, work, strict=True)]
        messages = [(src, dst, tokens * per_token[payload]) for payload, src, dst, tokens in transfers]
        ready = clock if costs.overlap else computed
        arrived = transfer_times(messages, ready, costs.network) if costs.network else list(ready)
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
