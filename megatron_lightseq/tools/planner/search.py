"""Which way is best: parallel sizes, methods, recomputation and slices that fit, by predicted time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_lightseq.config.sizes import ParallelSizes
from megatron_lightseq.errors import ConfigError, UnsupportedError, explain
from megatron_lightseq.tools.planner.cluster import GIB
from megatron_lightseq.tools.planner.cost import StepTime, predict_time
from megatron_lightseq.tools.planner.footprint import CONTEXT_BYTES, Footprint, footprint
from megatron_lightseq.tools.planner.parameters import rank_parameters
from megatron_lightseq.tools.planner.request import Request

METHODS = ("lightseq", "zigzag", "ulysses", "usp")
"""Those that are best somewhere, of those that need no score matrices and no plan of their own."""
RECOMPUTE: dict[str, dict[str, Any]] = {
    "no": {"recompute_granularity": None, "recompute_method": None, "recompute_num_layers": None},
    "MLPs": {
        "recompute_granularity": "selective",
        "recompute_modules": ("mlp",),
        "recompute_method": None,
        "recompute_num_layers": None,
    },
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
"""From the least recomputation to the most, which needs the least memory."""
SLICE_TOKENS = 2048
"""Tokens per slice of MLPs and losses."""
LEAST_TOKENS = 1024
"""Per rank: with fewer, kernels are too short for anything to hide behind them."""
_MAX_TRACED = 30
"""Layouts whose memory is traced at most."""
_EQUAL = 0.0005
"""Relative differences of time that count as none."""
_CERTAIN = 0.8
"""Of what activations took elsewhere: they do not grow quite in proportion."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A layout that fits."""

    request: Request
    time: StepTime
    memory: Footprint


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    request: Request
    time: StepTime
    variant: tuple[str, bool]
    """What is recomputed, and whether MLPs and losses are computed in slices."""

    @property
    def load(self) -> float:
        """What activations grow with: tokens times layers that a rank holds, shared by tensor parallelism."""
        config = self.request.config
        sizes = ParallelSizes.of(config, self.request.cluster.num_gpus)
        tokens = config.training.seq_length * config.training.micro_batch_size / sizes.context
        in_flight = min(self.request.micro_batches, sizes.pipeline)
        return tokens * config.model.num_layers / sizes.pipeline * in_flight / sizes.tensor


class _Memory:
    """Traces candidates, and remembers what activations take per variant, so that few are traced in vain."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity = capacity_bytes
        self._per_load: dict[tuple[str, bool], float] = {}
        self.traced: list[Footprint] = []

    def fits(self, candidate: _Candidate) -> Footprint | None:
        """The candidate's memory if it fits; else None, without a trace where that is clear."""
        known = self._per_load.get(candidate.variant, 0.0)
        static = _static_bytes(candidate.request)
        if static + _CERTAIN * known * candidate.load > self._capacity:
            return None
        found = footprint(candidate.request, quick=True)
        self.traced.append(found)
        measured = max(0.0, found.fullest.total_bytes - static) / candidate.load
        self._per_load[candidate.variant] = min(self._per_load.get(candidate.variant, measured), measured)
        return found if found.fits else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """What a search found."""

    found: tuple[Found, ...]
    """Fastest first."""
    considered: int
    """Layouts whose time was predicted."""
    traced: int
    """Layouts whose memory was traced."""


def search(request: Request, count: int = 5) -> Ranking:
    """The ``count`` fastest layouts that fit into memory.

    Time is predicted for all layouts that obey the rules. Memory is traced from the fastest on, until enough fit.
    Layouts are passed over if activations of the same kind took so much elsewhere that they cannot fit.

    Raises:
        ConfigError: no layout fits.
    """
    candidates = sorted(_candidates(request), key=lambda candidate: candidate.time.seconds)
    memory, found = _Memory(request.cluster.gpu.memory_bytes), list[Found]()
    for candidate in candidates:
        if len(found) == count or len(memory.traced) >= _MAX_TRACED:
            break
        held = memory.fits(candidate)
        if held is not None:
            found.append(Found(request=candidate.request, time=candidate.time, memory=held))
    if not found:
        raise _nothing_fits(request, len(candidates), memory.traced)
    return Ranking(found=tuple(found), considered=len(candidates), traced=len(memory.traced))


def _candidates(request: Request) -> Iterator[_Candidate]:
    """Layouts that obey the rules and whose weights alone fit."""
    per_node, world = request.cluster.gpus_per_node, request.cluster.num_gpus
    layers = request.config.model.num_layers
    for tensor, pipeline in itertools.product(_divisors(per_node), _divisors(layers)):
        if world % (tensor * pipeline):
            continue
        most = min(world // (tensor * pipeline), request.config.training.seq_length // LEAST_TOKENS)
        for context in _divisors(world // (tensor * pipeline)):
            if context <= most:
                yield from _of_sizes(request, tensor, pipeline, context)


def _of_sizes(request: Request, tensor: int, pipeline: int, context: int) -> Iterator[_Candidate]:
    sizes = {
        "tensor_model_parallel_size": tensor,
        "sequence_parallel": tensor > 1,
        "pipeline_model_parallel_size": pipeline,
        "num_layers_per_virtual_pipeline_stage": None,
        "context_parallel_size": context,
        "use_distributed_optimizer": request.cluster.num_gpus > tensor * pipeline,
    }
    try:
        first = request.but(**sizes, **RECOMPUTE["full"], **_method(METHODS[0]))
    except (ConfigError, UnsupportedError):
        return  # the sizes themselves break a rule
    if _static_bytes(first) > request.cluster.gpu.memory_bytes:
        return
    for method in METHODS if context > 1 else METHODS[:1]:
        for (name, recompute), tokens in itertools.product(RECOMPUTE.items(), (None, SLICE_TOKENS)):
            sliced = {"mlp_tile_tokens": tokens, "loss_tile_tokens": tokens}
            try:
                changed = request.but(**sizes, **recompute, **_method(method), **sliced)
            except (ConfigError, UnsupportedError):
                continue
            yield _Candidate(request=changed, time=predict_time(changed), variant=(name, tokens is not None))


def _method(name: str) -> dict[str, Any]:
    return {"cp_method": name, "cp_ulysses_size": None, "cp_layout": "auto", "cp_comm_type": ()}


def _static_bytes(request: Request) -> float:
    """Weights, gradients and optimizer state, at least."""
    config = request.config
    parameters = rank_parameters(config, 0)
    element = 2 if config.training.bf16 else 4
    state = 12 if config.training.bf16 else 8
    parallel = config.parallel
    if parallel.use_distributed_optimizer:
        state_ranks = request.cluster.num_gpus
        state_ranks //= parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        return parameters * (element + 4 + state / state_ranks) + CONTEXT_BYTES
    return parameters * (element + 4 + state) + CONTEXT_BYTES


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _nothing_fits(request: Request, considered: int, traced: list[Footprint]) -> ConfigError:
    least = min((found.fullest.total_bytes for found in traced), default=None)
    needs = "" if least is None else f", of which the smallest that was traced needs {least / GIB:.1f} GiB"
    return ConfigError(
        explain(
            got=f"{considered} layouts on {request.cluster}{needs}",
            rule=f"a GPU has {request.cluster.gpu.memory_bytes / GIB:.1f} GiB",
            remedy="Use more GPUs, GPUs with more memory, or a shorter sequence",
        )
    )


def reasons(ranking: Ranking) -> list[str]:
    """For every layout: why it is where it is, compared with the first."""
    first, *others = ranking.found
    shares = sorted(first.time.parts.items(), key=lambda part: -part[1])
    waiting = [f"{name} {seconds / first.time.seconds:.0%}" for name, seconds in shares if seconds > 0][:3]
    texts = [f"most of its time is {', '.join(waiting)}"]
    for other in others:
        more = {name: seconds - first.time.parts[name] for name, seconds in other.time.parts.items()}
        name = max(more, key=more.__getitem__)
        slower = other.time.seconds / first.time.seconds - 1
        texts.append("as fast" if slower < _EQUAL else f"{slower:.1%} slower: {name} {more[name]:+.2f} s")
    return texts
