"""A plan as text and as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_lightseq.config.sizes import ParallelSizes
from megatron_lightseq.tools.planner.cluster import GIB
from megatron_lightseq.tools.planner.cost import StepTime
from megatron_lightseq.tools.planner.footprint import ALLOCATOR, LIBRARIES, Footprint
from megatron_lightseq.tools.planner.purposes import PURPOSES
from megatron_lightseq.tools.planner.request import Request
from megatron_lightseq.tools.planner.search import Ranking, reasons

_SMALLEST = 0.005
"""GiB: purposes that take less on every stage are added up as the last of :data:`PURPOSES`."""


def layout(request: Request) -> str:
    """The parallel sizes and the method in a few words."""
    config = request.config
    sizes = ParallelSizes.of(config, request.cluster.num_gpus)
    words = [f"TP {sizes.tensor}", f"PP {sizes.pipeline}", f"CP {sizes.context}", f"DP {sizes.data}"]
    if config.experts.num_experts:
        words.append(f"EP {config.parallel.expert_model_parallel_size}")
    method = f"{config.context.method_name}, " if sizes.context > 1 else ""
    recompute = config.recompute.recompute_granularity or "no"
    return f"{' x '.join(words)}, {method}{recompute} recompute, {config.training.seq_length:,} tokens"


def memory_table(found: Footprint) -> list[str]:
    """GiB by purpose and pipeline stage."""
    rows = _rows(found)
    width = max(len(name) for name in rows)
    head = f"{'GiB of the fullest rank':{width}}" + "".join(f"{f'stage {s.number}':>9}" for s in found.stages)
    lines = [head]
    lines += [f"{name:{width}}" + "".join(f"{amount:9.2f}" for amount in row) for name, row in rows.items()]
    totals = "".join(f"{stage.total_bytes / GIB:9.2f}" for stage in found.stages)
    lines.append(f"{f'of {found.capacity_bytes / GIB:.1f}':{width}}{totals}")
    lines.append(f"{'peak in the phase':{width}}" + "".join(f"{stage.phase:>9}" for stage in found.stages))
    return lines


def _rows(found: Footprint) -> dict[str, list[float]]:
    names = (*PURPOSES, ALLOCATOR, LIBRARIES)
    rows = {name: [stage.holdings.get(name, 0) / GIB for stage in found.stages] for name in names}
    small = [name for name in names if name != PURPOSES[-1] and max(rows[name]) < _SMALLEST]
    for name in small:
        rows[PURPOSES[-1]] = [a + b for a, b in zip(rows[PURPOSES[-1]], rows.pop(name), strict=True)]
    return rows


@dataclass(frozen=True, slots=True)
class Longest:
    """What a search for the longest sequence found."""

    tokens: int | None
    """None if no sequence fits."""


def verdict(found: Footprint, longest: Longest | None) -> str:
    """Whether it fits, by how much, and up to which length it would; None: nobody has looked."""
    fullest = found.fullest
    spare = (found.capacity_bytes - fullest.total_bytes) / GIB
    if found.fits:
        first = f"It fits: {spare:.1f} GiB are left on stage {fullest.number}"
    else:
        first = f"It does not fit: stage {fullest.number} lacks {-spare:.1f} GiB"
    if longest is None:
        return f"{first}."
    if longest.tokens is None:
        return f"{first}. No sequence fits: weights, gradients and optimizer state need more ranks or more memory."
    return f"{first}. The longest sequence that fits has {longest.tokens:,} tokens."


def time_table(time: StepTime) -> list[str]:
    """Seconds by part of one step."""
    rows = {name: seconds for name, seconds in time.parts.items() if seconds > 0}
    width = max(len(name) for name in rows)
    lines = [f"{'seconds per step':{width}}"]
    lines += [
        f"{name:{width}}{seconds:9.2f}  {seconds / time.seconds:4.0%}" for name, seconds in rows.items()
    ]
    lines.append(f"{'together':{width}}{time.seconds:9.2f}")
    lines.append(f"{time.tokens_per_s:,.0f} tokens/s, {time.utilisation:.1%} of the GPUs' peak (MFU)")
    return lines


def ranking_table(ranking: Ranking) -> list[str]:
    """The best layouts, with the reason of each."""
    lines = [
        f"{ranking.considered} layouts predicted, the memory of {ranking.traced} traced; the best that fit:",
        "",
    ]
    for number, (found, why) in enumerate(zip(ranking.found, reasons(ranking), strict=True), start=1):
        config = found.request.config
        sliced = ", slices" if config.recompute.mlp_tile_tokens else ""
        lines.append(f"{number}. {layout(found.request)}{sliced}")
        lines.append(
            f"   {found.time.seconds:.2f} s, {found.time.tokens_per_s:,.0f} tokens/s, MFU "
            f"{found.time.utilisation:.1%}, {found.memory.fullest.total_bytes / GIB:.1f} GiB; {why}"
        )
    return lines


def as_json(request: Request, found: Footprint, longest: Longest | None, time: StepTime) -> dict[str, Any]:
    """Everything in the report, in bytes, tokens and seconds; ``longest_sequence`` is there if it was looked for."""
    return {
        "cluster": str(request.cluster),
        "layout": layout(request),
        "memory": {
            "capacity_bytes": found.capacity_bytes,
            "fits": found.fits,
            "stages": [
                {
                    "stage": stage.number,
                    "rank": stage.rank,
                    "phase": stage.phase,
                    "total_bytes": stage.total_bytes,
                    "bytes": dict(stage.holdings),
                }
                for stage in found.stages
            ],
        },
        **({} if longest is None else {"longest_sequence": longest.tokens}),
        "time": {
            "seconds": time.seconds,
            "tokens_per_second": time.tokens_per_s,
            "model_flops_utilisation": time.utilisation,
            "parts_in_seconds": time.parts,
        },
    }
