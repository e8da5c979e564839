"""The memory of every pipeline stage, whether it fits, and the longest sequence that does."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lightseq.config.sizes import ParallelSizes
from megatron_lightseq.errors import ConfigError
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.tools.planner.cluster import GIB
from megatron_lightseq.tools.planner.ledger import Holdings, Moment
from megatron_lightseq.tools.planner.memory import rank_memory
from megatron_lightseq.tools.planner.request import Request
from megatron_lightseq.tools.planner.trace import stage_rank

ALLOCATOR = "allocator (assumed)"
LIBRARIES = "CUDA and NCCL (assumed)"
FRAGMENTATION = 0.04
"""Of the tensors: what the caching allocator reserves and cannot use. An assumption."""
CONTEXT_BYTES = int(0.75 * GIB)
"""CUDA's context, the kernels of torch, and cuBLAS's workspace. An assumption."""
COMMUNICATOR_BYTES = int(0.25 * GIB)
"""Of one NCCL communicator: 32 channels of two buffers of 4 MiB. An assumption, from NCCL's defaults."""

_CLOSE = 0.98
"""Of the capacity: a sequence that needs as much is as good as the longest."""
_LENGTH_GRAIN = 64
"""Tokens per chunk and tensor parallel rank: longest sequences are multiples of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """The fullest rank of one pipeline stage."""

    number: int
    rank: int
    holdings: Holdings
    """Bytes by purpose at its peak."""
    phase: str
    """When the peak is: forward, backward or update."""

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return sum(self.holdings.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """The memory of a request."""

    stages: tuple[Stage, ...]
    capacity_bytes: int

    @property
    def fullest(self) -> Stage:
        """The stage that decides."""
        return max(self.stages, key=lambda stage: stage.total_bytes)

    @property
    def fits(self) -> bool:
        """Whether every stage fits."""
        return self.fullest.total_bytes <= self.capacity_bytes


def footprint(request: Request, *, quick: bool = False) -> Footprint:
    """The fullest rank of every pipeline stage.

    The first two stages and the last two are traced on their last context parallel ranks, and the fullest of them on
    the first one too; other ranks lie between those. Stages between hold the same layers and fewer micro-batches, each
    as many fewer as the next one.

    Args:
        request: what is planned.
        quick: trace only the first and the last stage, and of each only the last context parallel rank.
    """
    parallel = request.config.parallel
    pipeline, last = parallel.pipeline_model_parallel_size, parallel.context_parallel_size - 1
    numbers = {0, pipeline - 1} if quick else {0, min(1, pipeline - 1), max(0, pipeline - 2), pipeline - 1}
    traced = {number: _rank(request, number, last) for number in sorted(numbers)}
    if not quick:
        _compare_first(request, traced)
        for number in range(2, pipeline - 2):
            traced[number] = _between(traced[1], traced[pipeline - 2], number)
    stages = tuple(traced[number] for number in sorted(traced))
    return Footprint(stages=stages, capacity_bytes=request.cluster.gpu.memory_bytes)


def _compare_first(request: Request, traced: dict[int, Stage]) -> None:
    """On the fullest stage, take the first context parallel rank if it is fuller than the last one."""
    fullest = max(traced.values(), key=lambda stage: stage.total_bytes)
    if request.config.parallel.context_parallel_size > 1:
        first = _rank(request, fullest.number, 0)
        traced[fullest.number] = max(fullest, first, key=lambda stage: stage.total_bytes)


def _rank(request: Request, number: int, context_rank: int) -> Stage:
    world_size = request.cluster.num_gpus
    rank = stage_rank(request.config, world_size, number, context_rank)
    traced = rank_memory(request.config, rank, world_size, vocab_size=request.vocab_size, fused=True)
    phase = max(traced.peaks, key=lambda name: traced.peaks[name].total)
    return Stage(number=number, rank=rank, phase=phase, holdings=with_overhead(request, traced.peaks[phase]))


def with_overhead(request: Request, peak: Moment) -> Holdings:
    """Tensors, and what is not a tensor."""
    sizes = ParallelSizes.of(request.config, request.cluster.num_gpus)
    groups = sum(size > 1 for size in (sizes.tensor, sizes.pipeline, sizes.context, sizes.data))
    groups += sizes.context * sizes.data > 1
    more = {
        ALLOCATOR: int(FRAGMENTATION * peak.total),
        LIBRARIES: CONTEXT_BYTES + groups * COMMUNICATOR_BYTES,
    }
    return {**peak.by_purpose, **more}


def _between(first: Stage, last: Stage, number: int) -> Stage:
    """A stage between two that hold the same layers, by interpolation."""
    share = (number - first.number) / (last.number - first.number)
    purposes = {**first.holdings, **last.holdings}
    holdings = {
        purpose: int((1 - share) * first.holdings.get(purpose, 0) + share * last.holdings.get(purpose, 0))
        for purpose in purposes
    }
    step = (last.rank - first.rank) // (last.number - first.number)
    return Stage(
        number=number,
        rank=first.rank + step * (number - first.number),
        phase=first.phase,
        holdings=holdings,
    )


def longest_sequence(request: Request, found: Footprint) -> int | None:
    """The longest sequence that fits, in tokens over all ranks; None if not even the shortest does.

    Memory grows with the sequence in a straight line (with methods that hold score matrices, faster). The line
    through two traced lengths says where it reaches the capacity, and that length is traced in turn.

    Args:
        request: what is planned.
        found: its footprint.
    """
    unit = _length_unit(request)
    known = {request.config.training.seq_length: _most(found)}
    half = _allowed(request, request.config.training.seq_length // 2, unit)
    if half is None or half in known:
        return request.config.training.seq_length if found.fits else None
    known[half] = _fullest_at(request, found, half)
    best = max((length for length, most in known.items() if most <= found.capacity_bytes), default=None)
    for _ in range(3):
        guess = _allowed(request, _where(known, found.capacity_bytes), unit)
        if guess is None or guess in known:
            break
        known[guess] = _fullest_at(request, found, guess)
        if known[guess] <= found.capacity_bytes:
            best = max(best or 0, guess)
            if known[guess] > _CLOSE * found.capacity_bytes:
                break
    return best


def _most(found: Footprint) -> int:
    return found.fullest.total_bytes


def _fullest_at(request: Request, found: Footprint, length: int) -> int:
    """Bytes of the rank that is fullest at the configured length, at another one."""
    longer = request.but(seq_length=length)
    world_size = request.cluster.num_gpus
    traced = rank_memory(
        longer.config, found.fullest.rank, world_size, vocab_size=request.vocab_size, fused=True
    )
    return sum(with_overhead(longer, traced.peak).values())


def _where(known: dict[int, int], capacity: int) -> int:
    """Where the line through the two lengths nearest to the capacity reaches it; a little below it."""
    near = sorted(known, key=lambda length: abs(known[length] - capacity))[:2]
    (x0, x1), (y0, y1) = sorted(near), sorted(known[length] for length in near)
    slope = (y1 - y0) / (x1 - x0)
    return int(x0 + (0.998 * capacity - y0) / slope) if slope > 0 else x0


def _length_unit(request: Request) -> int:
    """Sequence lengths that are multiples of it divide over the ranks."""
    parallel = request.config.parallel
    chunks = SequenceLayout(request.config.context.layout_name, parallel.context_parallel_size).num_chunks
    return _LENGTH_GRAIN * chunks * parallel.tensor_model_parallel_size


def _allowed(request: Request, length: int, unit: int) -> int | None:
    """The longest length up to ``length`` that the configuration may have; None if there is none near."""
    for multiple in range(length // unit, max(0, length // unit - 64), -1):
        try:
            request.but(seq_length=multiple * unit)
        except ConfigError:
            continue
        return multiple * unit
    return None
