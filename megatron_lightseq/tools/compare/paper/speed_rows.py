"""Rows 1, 3, 4 and 5: iteration times against Megatron, Ring Self-Attention, the unbalanced ring, Ulysses and plain
recomputation.

Times of two processes are meaningful, because each has a core. Eight processes share the cores, so for these only
operations, bytes and memory are compared, and the rows say so.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_lightseq.schedule import METHODS, Direction
from megatron_lightseq.tools.compare.paper.experiment import MIB, Experiments, K, Row, value_range
from megatron_lightseq.tools.compare.paper.model import PAPER_LIGHTSEQ, iteration_seconds, simulate_attention
from megatron_lightseq.tools.compare.paper.published import (
    LLAMA_7B,
    LLAMA_33H,
    LLAMA_GQA,
    TABLE_1,
    TABLE_4,
    TABLE_5,
    TABLE_5_KEPT,
    Cell,
)
from megatron_lightseq.tools.compare.paper.schedule_rows import makespan
from megatron_lightseq.tools.compare.systems import SYSTEMS

_RECOMPUTE_LENGTHS = (1024, 2048, 4096, 8192, 16384)
"""Tokens per rank in row 5. The paper also measures 32K, which would take minutes per step here."""


def against_megatron(experiments: Experiments) -> list[Row]:
    """Row 1: Table 1."""
    rows = []
    for name, model in (("llama-7b", LLAMA_7B), ("llama-gqa", LLAMA_GQA), ("llama-33h", LLAMA_33H)):
        job = experiments.job(name, 2)
        label = f"1 {name}"
        experiments.compare(label, job, "megatron-tp-sp", "lightseq")
        pairs = [
            (Cell("megatron", cell.gpus, cell.seq_length, model), cell)
            for cell in TABLE_1
            if cell.system == "lightseq" and cell.model == model
        ]
        published = [TABLE_1[theirs] / TABLE_1[ours] for theirs, ours in pairs]
        predicted = [iteration_seconds(theirs) / iteration_seconds(ours) for theirs, ours in pairs]
        largest = max(abs(mine / wanted - 1) for mine, wanted in zip(predicted, published, strict=True))
        rows.append(
            Row(
                row="1",
                what=f"time per iteration against Megatron TP+SP, {model.name}",
                paper=value_range(published),
                here=f"{experiments.ratio(label, 'lightseq')} (2 processes, {job.common.training.seq_length} tokens)",
                predicted=f"{value_range(predicted)}, largest error of {len(pairs)} ratios {largest:.1%}",
            )
        )
    return [*rows, _padding(experiments)]


def _padding(experiments: Experiments) -> Row:
    job = replace(experiments.job("llama-33h", 8, seq_length=1024), steps=1, warmup_steps=0)
    figures = experiments.compare("1 llama-33h, 8 processes", job, "megatron-tp-sp", "lightseq")
    megatron, ours = figures["megatron-tp-sp"], figures["lightseq"]
    gradients = ours.bytes_sent - ours.attention_bytes_sent
    ratio = megatron.mean_bytes_sent / (ours.mean_bytes_sent - gradients)
    heads = SYSTEMS["megatron-tp-sp"].configure(job.common, 8).model.num_attention_heads
    return Row(
        row="1",
        what="operations and bytes, Llama-33H on 8 ranks",
        paper="40 heads for 33 (21.2 % more); 4.7x the bytes of LightSeq's attention",
        here=f"{heads} heads for 33; {ratio:.1f}x the bytes of LightSeq's attention; "
        f"{megatron.attention_forwards} attention forward passes against {ours.attention_forwards}",
        note="8 processes share the cores, so operations and bytes are counted; gloo's reduce-scatter sends twice as "
        "much as NCCL's",
    )


def against_rsa(experiments: Experiments) -> list[Row]:
    """Row 3: Table 3."""
    job = replace(experiments.job("llama-2h", 2, seq_length=2048), profile_memory=True)
    figures = experiments.compare("3", job, "rsa", "lightseq")
    memory = {name: (row.peak_tensor_bytes or 0) / MIB for name, row in figures.items()}
    return [
        Row(
            row="3",
            what="against Ring Self-Attention",
            paper="5.64x on one node, 4.45x on two; 8x the length",
            here=f"{experiments.ratio('3', 'lightseq')} (2 processes, 2048 tokens); peak of tensors "
            f"{memory['rsa']:.0f} against {memory['lightseq']:.0f} MiB, growing quadratically against linearly with "
            "the sequence length",
        )
    ]


def against_ring_and_ulysses(experiments: Experiments) -> list[Row]:
    """Row 4: the unbalanced ring, and Table 4."""
    job = experiments.job("llama-33h", 2)
    figures = experiments.compare("4", job, "ulysses", "ring", "lightseq")
    seconds = {name: row.median_seconds for name, row in figures.items()}
    work = {name: makespan(METHODS[name], 8) for name in ("ring", "lightseq")}
    cell = Cell("lightseq", 8, 256 * K, LLAMA_7B)
    ring, balanced = (
        simulate_attention(method, cell, Direction.FORWARD).makespan_s
        for method in (METHODS["ring"], PAPER_LIGHTSEQ)
    )
    pairs = [(cell, Cell("lightseq", cell.gpus, cell.seq_length, cell.model)) for cell in TABLE_4]
    published = [TABLE_4[theirs] / TABLE_1[ours] for theirs, ours in pairs]
    predicted = [iteration_seconds(theirs) / iteration_seconds(ours) for theirs, ours in pairs]
    return [
        Row(
            row="4",
            what="attention forward against the unbalanced ring",
            paper="1.67x on 8",
            here=f"iteration {seconds['ring'] / seconds['lightseq']:.2f}x on 2; attention work of the busiest of 8 "
            f"ranks {work['ring'] / work['lightseq']:.2f}x",
            predicted=f"{ring / balanced:.2f}x ({ring / balanced / 1.67 - 1:+.1%})",
            note="8 processes share the cores, so work is counted",
        ),
        Row(
            row="4",
            what="against DeepSpeed-Ulysses",
            paper=value_range(published),
            here=f"{experiments.ratio('4', 'lightseq')} (Llama-33H, 2 processes)",
            predicted=value_range(predicted),
        ),
    ]


def recompute(experiments: Experiments) -> list[Row]:
    """Row 5: Table 5."""
    rows = []
    for tokens in _RECOMPUTE_LENGTHS:
        label = f"5 {tokens}"
        job = experiments.job("llama-8h", 2, seq_length=2 * tokens)
        experiments.compare(label, job, "lightseq-plain-recompute", "lightseq")
        kept = iteration_seconds(Cell("lightseq", 8, 8 * tokens, LLAMA_7B))
        plain = iteration_seconds(Cell("lightseq-recompute", 8, 8 * tokens, LLAMA_7B))
        rows.append(
            Row(
                row="5",
                what=f"keeping attention instead of recomputing it, {tokens} tokens per rank",
                paper=_TABLE_5_RATIOS.get(tokens, "-"),
                here=experiments.ratio(label, "lightseq"),
                predicted=f"{plain / kept:.2f}x",
            )
        )
    return rows


_TABLE_5_RATIOS = {
    cell.seq_length // 8: f"{seconds / kept:.2f}x"
    for (cell, seconds), kept in zip(TABLE_5.items(), TABLE_5_KEPT.values(), strict=True)
}
"""By tokens per GPU."""
