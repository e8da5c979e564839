"""Row 2: the longest sequence under a fixed memory budget."""

from __future__ import annotations

import math
from dataclasses import replace

from megatron_lightseq.config import with_values
from megatron_lightseq.config.accounting import hardware_flops
from megatron_lightseq.tools.compare.job import VOCAB_SIZE, Job
from megatron_lightseq.tools.compare.launch import measure
from megatron_lightseq.tools.compare.longest import longest_sequence
from megatron_lightseq.tools.compare.paper.experiment import MIB, Experiments, K, Row
from megatron_lightseq.tools.compare.systems import SLICES, SYSTEMS
from megatron_lightseq.tools.ranks import Cluster

MEMORY_BUDGET = 128 * MIB
"""Per rank, in addition to Python and its libraries."""
_LONGEST = 64 * K
"""Longest sequence to try: a step with twice as many tokens takes eight processes on two cores many minutes."""
_TIMEOUT_S = 3600.0
"""Of a step: one that timed out would count as too long for memory."""
_GROWTH_LENGTHS = (8 * K, 16 * K)
"""Numbers of tokens between which memory growth is measured: more than a slice has."""


def longest(experiments: Experiments) -> list[Row]:
    """Row 2: Table 2."""
    rows = []
    for name, paper in (("llama-2h", "8x (TP+DP), 4x (TP+PP)"), ("llama-4h", "4x (TP+DP), 2x (TP+PP)")):
        job = replace(experiments.job(name, 8), memory_budget_bytes=MEMORY_BUDGET)
        base, ours, unsliced = (
            _fits(experiments, job, system) for system in ("megatron-tp-pp", "lightseq-slices", "lightseq")
        )
        here = f"{_ratio(ours, base)}: {_length(ours)} against {_length(base)}"
        here += f"; without slices {_length(unsliced)}"
        rows.append(
            Row(
                row="2",
                what=f"longest sequence, {name}, {MEMORY_BUDGET // MIB} MiB per rank, ours with MLP and loss in slices "
                f"(without: {_ratio(unsliced, base)}), against Megatron TP+PP",
                paper=paper,
                here=here + (_on_equal_terms(experiments, job) if name == "llama-2h" else ""),
                note=_conditions(job),
            )
        )
    return rows


def _conditions(job: Job) -> str:
    """The conditions of the search, and the cost of slices."""
    return (
        "8 processes; the limit is RLIMIT_DATA; lengths are 2K, 3K, 4K, 6K and so on, up to "
        f"{_LONGEST // K}K. All with full recompute; Megatron with sequence parallelism and torch's fused attention; "
        f"LightSeq with slices of {SLICES['mlp_tile_tokens']} tokens, which Megatron does not have and which add "
        f"{_added_operations(job):.2%} to its operations at {_GROWTH_LENGTHS[1] // K}K"
    )


def _on_equal_terms(experiments: Experiments, job: Job) -> str:
    """Memory growth with slices for neither or both systems, and the effect of padding Megatron's heads."""
    growth = {
        system: _bytes_per_token(experiments, job, system) / K
        for system in ("lightseq", "megatron-tp-pp", "lightseq-slices", "megatron-tp-pp-slices")
    }
    sliced, padded = (
        _fits(experiments, job, system) for system in ("megatron-tp-pp-slices", "megatron-tp-sp")
    )
    heads = SYSTEMS["megatron-tp-sp"].configure(job.common, 8).model.num_attention_heads
    return (
        f"; tensors of the rank with the highest peak grow by {growth['lightseq']:.2f} KiB per token against "
        f"{growth['megatron-tp-pp']:.2f} without slices, {growth['lightseq-slices']:.2f} against "
        f"{growth['megatron-tp-pp-slices']:.2f} if Megatron used our slices ({_length(sliced)}); Megatron TP+SP with 2 "
        f"heads padded to {heads}: {_length(padded)}, at {heads / 2:.0f}x the work"
    )


def _bytes_per_token(experiments: Experiments, job: Job, system: str) -> float:
    """Growth of the peak of tensors per token of the sequence, on the rank with the highest peak."""
    peaks = []
    for tokens in _GROWTH_LENGTHS:
        common = with_values(job.common, seq_length=tokens)
        result = measure(
            replace(
                job, system=system, common=common, memory_budget_bytes=None, steps=1, profile_memory=True
            ),
            Cluster(timeout_s=_TIMEOUT_S),
        )
        peaks.append(max((rank.peak_tensor_bytes or 0 for rank in result.ranks), default=math.nan))
        experiments.report(f"{system}: tensors of {peaks[-1] / MIB:.1f} MiB at {tokens} tokens")
    return (peaks[1] - peaks[0]) / (_GROWTH_LENGTHS[1] - _GROWTH_LENGTHS[0])


def _fits(experiments: Experiments, job: Job, system: str) -> int:
    return longest_sequence(
        replace(job, system=system),
        start=2 * K,
        limit=_LONGEST,
        halvings=1,
        cluster=Cluster(timeout_s=_TIMEOUT_S),
        report=experiments.report,
    ).fits


def _length(tokens: int) -> str:
    if tokens == 0:
        return "none"
    return f"{tokens // K}K" if tokens < _LONGEST else f"at least {tokens // K}K"


def _ratio(ours: int, theirs: int) -> str:
    if theirs == 0:
        return "no ratio"
    return f"{'at least ' if ours >= _LONGEST else ''}{ours / theirs:.2g}x"


def _added_operations(job: Job) -> float:
    """Share of operations that slices add on a LightSeq rank, recomputation included."""
    common = with_values(job.common, seq_length=_GROWTH_LENGTHS[1])
    sliced, unsliced = (
        hardware_flops(SYSTEMS[system].configure(common, job.world_size), VOCAB_SIZE)
        for system in ("lightseq-slices", "lightseq")
    )
    return sliced / unsliced - 1
