"""The memory of one rank with any number of layers: a few layers are traced, and the others are like them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_lightseq.config import PretrainConfig
from megatron_lightseq.config.flat import with_values
from megatron_lightseq.config.sizes import ParallelSizes
from megatron_lightseq.tools.planner.ledger import Moment
from megatron_lightseq.tools.planner.trace import Traced, trace


@dataclass(frozen=True, slots=True)
class Depth:
    """Layers of one model chunk (a pipeline stage, or a virtual one) of one rank."""

    layers: int
    recomputed: int | None = None
    """With ``recompute_method: block``: how many of them are recomputed."""


def chunk_depth(config: PretrainConfig) -> Depth:
    """The layers of one model chunk."""
    virtual = config.parallel.num_layers_per_virtual_pipeline_stage
    layers = virtual or config.model.num_layers // config.parallel.pipeline_model_parallel_size
    recompute = config.recompute
    if recompute.recompute_granularity != "full" or recompute.recompute_method != "block":
        return Depth(layers)
    return Depth(layers, min(layers, recompute.recompute_num_layers or 0))


def repeat_unit(config: PretrainConfig) -> int | None:
    """After how many layers a chunk repeats itself; None if it does not."""
    recompute, model = config.recompute, config.model
    patterns = (
        config.experts.moe_layer_freq if config.experts.num_experts else None,
        model.window_attn_skip_freq if model.window_size else None,
        config.rope.no_rope_freq,
    )
    if any(isinstance(pattern, tuple) for pattern in patterns):
        return None
    unit = math.lcm(*(pattern for pattern in patterns if isinstance(pattern, int)))
    if recompute.recompute_granularity == "full" and recompute.recompute_method == "uniform":
        return math.lcm(unit, recompute.recompute_num_layers or 1)
    return unit


def rank_memory(
    config: PretrainConfig, rank: int, world_size: int, *, vocab_size: int, fused: bool
) -> Traced:
    """The peaks of one rank's training step.

    At most three units of repeated layers are traced. What one more adds to the peak of each phase counts for all
    others: layers of a kind are equal, and a phase's peak is at the same place of the model for any number of them.

    Args:
        config: of the run; its rules must hold.
        rank: of ``world_size``.
        world_size: number of ranks.
        vocab_size: of the tokenizer.
        fused: with Megatron's fusions, which it uses on GPUs.
    """
    config = _with_few_micro_batches(config, world_size)
    depth, unit = chunk_depth(config), repeat_unit(config)

    def traced(at: Depth) -> Traced:
        return trace(_with_depth(config, at), rank, world_size, vocab_size=vocab_size, fused=fused)

    if unit is None:
        return traced(depth)
    kinds = _kinds(depth, unit)
    base = [(start, step) for start, step, _ in kinds]
    first = traced(_depth_of(depth, [start for start, _ in base]))
    peaks = first.peaks
    for number, (_, step, repeats) in enumerate(kinds):
        if repeats:
            more = [start + (step if index == number else 0) for index, (start, _) in enumerate(base)]
            peaks = _extended(peaks, first.peaks, traced(_depth_of(depth, more)).peaks, repeats)
    return Traced(peaks)


def _kinds(depth: Depth, unit: int) -> list[tuple[int, int, int]]:
    """For every kind of layer: how many are traced first, how many one more unit has, and how often it is repeated."""
    counts = (
        [depth.layers] if depth.recomputed is None else [depth.recomputed, depth.layers - depth.recomputed]
    )
    kinds = []
    for count in counts:
        start = min(count, 2 * unit + count % unit)
        kinds.append((start, unit, (count - start) // unit))
    return kinds


def _depth_of(depth: Depth, counts: list[int]) -> Depth:
    return Depth(counts[0]) if depth.recomputed is None else Depth(sum(counts), counts[0])


def _with_depth(config: PretrainConfig, depth: Depth) -> PretrainConfig:
    chunk = chunk_depth(config)
    chunks = config.model.num_layers // chunk.layers
    values: dict[str, int] = {"num_layers": depth.layers * chunks}
    if config.parallel.virtual_pipeline:
        values["num_layers_per_virtual_pipeline_stage"] = depth.layers
    if depth.recomputed is not None:
        values["recompute_num_layers"] = depth.recomputed
    return with_values(config, **values)


def _with_few_micro_batches(config: PretrainConfig, world_size: int) -> PretrainConfig:
    """As few micro-batches per step as fill the pipeline: more do not need more memory."""
    sizes, settings = ParallelSizes.of(config, world_size), config.training
    fill = 2 * sizes.pipeline if config.parallel.virtual_pipeline else sizes.pipeline + 1
    per_micro_batch = settings.micro_batch_size * sizes.data
    few = min(settings.global_batch_size, fill * per_micro_batch)
    return with_values(config, global_batch_size=few)


def _extended(
    peaks: dict[str, Moment], before: dict[str, Moment], after: dict[str, Moment], repeats: int
) -> dict[str, Moment]:
    """``peaks`` with what distinguishes ``after`` from ``before`` added ``repeats`` times."""
    found = {}
    for phase, moment in peaks.items():
        purposes = {*moment.by_purpose, *before[phase].by_purpose, *after[phase].by_purpose}
        amounts = {
            purpose: max(
                0,
                moment.by_purpose.get(purpose, 0)
                + repeats
                * (after[phase].by_purpose.get(purpose, 0) - before[phase].by_purpose.get(purpose, 0)),
            )
            for purpose in purposes
        }
        found[phase] = Moment(sum(amounts.values()), amounts)
    return found
