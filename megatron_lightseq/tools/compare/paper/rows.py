"""The paper's experiments, scaled to the machine at hand: its figure, ours here, and our prediction for its cluster.

    python -m megatron_lightseq.tools.compare.paper.rows CONFIG_FOLDER OUTPUT_FOLDER [ROW ...]

Rows are numbered as in scripts/reproduce_paper.sh. Two processes have a core each here, so their times mean
something; of eight processes on two cores only work, bytes and memory do, and those rows say so.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from megatron_lightseq.config import parse_config, with_values
from megatron_lightseq.config.accounting import hardware_flops
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.schedule import METHODS, Direction, Method, build, simulate
from megatron_lightseq.tools.compare.job import Job
from megatron_lightseq.tools.compare.launch import measure
from megatron_lightseq.tools.compare.longest import longest_sequence
from megatron_lightseq.tools.compare.paper.model import A100_CLUSTER, PAPER_LIGHTSEQ, iteration_seconds, play
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
from megatron_lightseq.tools.compare.run import VOCAB_SIZE, common_config, run_comparison
from megatron_lightseq.tools.compare.systems import SYSTEMS, TILES
from megatron_lightseq.tools.compare.tables import Comparison, Figures
from megatron_lightseq.tools.markdown import markdown_table
from megatron_lightseq.tools.ranks import Cluster

_K, _MIB = 1024, 2**20
MEMORY_BUDGET = 128 * _MIB
"""Per rank, beyond Python and its libraries, for row 2."""
_LONGEST = 64 * _K
"""Where row 2 stops looking: a step of twice that takes eight processes on two cores many minutes."""
_PATIENCE_S = 3600.0
"""For a step of row 2: one that is ended for its time would count as too long for memory."""
_GROWTH_LENGTHS = (8 * _K, 16 * _K)
"""Tokens between which row 2 measures how memory grows: past what a tile takes."""
_CURVE = (2, 3, 4, 5, 8, 16, 32)
_RECOMPUTE_LENGTHS = (1024, 2048, 4096, 8192, 16384)
"""Tokens per rank of row 5. The paper goes on to 32K, which would take minutes a step here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table."""

    row: str
    what: str
    paper: str
    here: str
    predicted: str = "-"
    """For the paper's cluster, next to its measurement."""
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workshop:
    """What the experiments share."""

    configs: Path
    output: Path
    report: Callable[[str], None]
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    """Everything that was run, for the record."""

    def job(self, name: str, ranks: int, **values: object) -> Job:
        """A job on configs/paper/NAME.yaml."""
        config = with_values(parse_config([str(self.configs / f"{name}.yaml")]), **values)
        return Job(
            system="lightseq",
            common=common_config(config, ranks),
            world_size=ranks,
            steps=2,
            profile_memory=False,
            measure_ceiling=False,
        )

    def compare(self, label: str, job: Job, *systems: str) -> dict[str, Figures]:
        """Figures by system, the first being the baseline."""
        chosen = [SYSTEMS[name] for name in systems]
        comparison = run_comparison(
            job, chosen, baseline=systems[0], report=lambda line: self.report(f"{label}: {line}")
        )
        self.comparisons[label] = comparison
        return {row.system: row for row in comparison.figures}

    def ratio(self, label: str, system: str) -> str:
        """Speed-up of a system over the comparison's baseline, or why there is none."""
        comparison = self.comparisons[label]
        row = next(row for row in comparison.figures if row.system == system)
        speedup = comparison.speedup(row)
        if speedup is not None:
            return f"{speedup:.2f}x"
        return f"refused: {comparison.disagreements.get(system) or row.problem or 'the baseline failed'}"


def against_megatron(shop: Workshop) -> list[Row]:
    """Row 1: Table 1."""
    rows = []
    for name, model in (("llama-7b", LLAMA_7B), ("llama-gqa", LLAMA_GQA), ("llama-33h", LLAMA_33H)):
        job = shop.job(name, 2)
        label = f"1 {name}"
        shop.compare(label, job, "megatron-tp-sp", "lightseq")
        pairs = [
            (Cell("megatron", cell.gpus, cell.seq_length, model), cell)
            for cell in TABLE_1
            if cell.system == "lightseq" and cell.model == model
        ]
        published = [TABLE_1[theirs] / TABLE_1[ours] for theirs, ours in pairs]
        predicted = [iteration_seconds(theirs) / iteration_seconds(ours) for theirs, ours in pairs]
        worst = max(abs(mine / wanted - 1) for mine, wanted in zip(predicted, published, strict=True))
        rows.append(
            Row(
                row="1",
                what=f"time per iteration against Megatron TP+SP, {model.name}",
                paper=_range(published),
                here=f"{shop.ratio(label, 'lightseq')} (2 processes, {job.common.training.seq_length} tokens)",
                predicted=f"{_range(predicted)}, worst of {len(pairs)} ratios {worst:.1%} off",
            )
        )
    return [*rows, _padding(shop)]


def _padding(shop: Workshop) -> Row:
    label = "1 llama-33h, 8 processes"
    figures = shop.compare(
        label, _small(shop.job("llama-33h", 8, seq_length=1024)), "megatron-tp-sp", "lightseq"
    )
    megatron, ours = figures["megatron-tp-sp"], figures["lightseq"]
    gradients = ours.bytes_sent - ours.attention_bytes_sent
    ratio = megatron.mean_bytes_sent / (ours.mean_bytes_sent - gradients)
    heads = SYSTEMS["megatron-tp-sp"].configure(shop.job("llama-33h", 8).common, 8).model.num_attention_heads
    return Row(
        row="1",
        what="the same, Llama-33H on 8: what each has to do",
        paper="40 heads for 33 (21.2 % more); 4.7x the bytes of LightSeq's attention",
        here=f"{heads} heads for 33; {ratio:.1f}x the bytes of LightSeq's attention; attention forwards "
        f"{megatron.attention_forwards} against {ours.attention_forwards}",
        note="8 processes share the cores, so work and bytes are counted; gloo's reduce-scatter sends twice NCCL's",
    )


def _small(job: Job) -> Job:
    return replace(job, steps=1, warmup_steps=0)


def longest(shop: Workshop) -> list[Row]:
    """Row 2: Table 2, the longest sequence under a fixed budget."""
    rows = []
    for name, paper in (("llama-2h", "8x (TP+DP), 4x (TP+PP)"), ("llama-4h", "4x (TP+DP), 2x (TP+PP)")):
        job = replace(shop.job(name, 8), memory_budget_bytes=MEMORY_BUDGET)
        base, ours, whole = (
            _fits(shop, job, system) for system in ("megatron-tp-pp", "lightseq-tiles", "lightseq")
        )
        here = f"{_ratio(ours, base)}: {_length(ours)} against {_length(base)}"
        here += f"; without tiles {_length(whole)}"
        rows.append(
            Row(
                row="2",
                what=f"longest sequence, {name}, {MEMORY_BUDGET // _MIB} MiB a rank, ours with MLP and loss in tiles "
                f"(without: {_ratio(whole, base)}), against Megatron TP+PP",
                paper=paper,
                here=here + (_on_equal_terms(shop, job) if name == "llama-2h" else ""),
                note=_terms(job),
            )
        )
    return rows


def _terms(job: Job) -> str:
    """Under what conditions row 2 searches, and what tiles cost there."""
    return (
        "8 processes; the limit is RLIMIT_DATA, lengths are 2K, 3K, 4K, 6K and so on, to "
        f"{_LONGEST // _K}K. All with full recompute; Megatron with sequence parallelism and torch's fused attention; "
        f"LightSeq with tiles of {TILES['mlp_tile_tokens']} tokens, which Megatron lacks and which add "
        f"{_added_operations(job):.2%} to its operations at {_GROWTH_LENGTHS[1] // _K}K"
    )


def _on_equal_terms(shop: Workshop, job: Job) -> str:
    """What tensors take where tiles are given to neither or to both, and what padding Megatron's heads buys."""
    growth = {
        system: _bytes_per_token(shop, job, system) / _K
        for system in ("lightseq", "megatron-tp-pp", "lightseq-tiles", "megatron-tp-pp-tiles")
    }
    lent, wide = (_fits(shop, job, system) for system in ("megatron-tp-pp-tiles", "megatron-tp-sp"))
    padded = SYSTEMS["megatron-tp-sp"].configure(job.common, 8).model.num_attention_heads
    return (
        f"; tensors of the fullest rank grow by {growth['lightseq']:.2f} KiB a token against "
        f"{growth['megatron-tp-pp']:.2f} without tiles, {growth['lightseq-tiles']:.2f} against "
        f"{growth['megatron-tp-pp-tiles']:.2f} were ours lent to Megatron ({_length(lent)}); Megatron TP+SP with 2 "
        f"heads padded to {padded}: {_length(wide)}, at {padded / 2:.0f}x the work"
    )


def _bytes_per_token(shop: Workshop, job: Job, system: str) -> float:
    """By how much the peak of the fullest rank's tensors grows with each token of the sequence."""
    peaks = []
    for tokens in _GROWTH_LENGTHS:
        common = with_values(job.common, seq_length=tokens)
        outcome = measure(
            replace(
                job, system=system, common=common, memory_budget_bytes=None, steps=1, profile_memory=True
            ),
            Cluster(timeout_s=_PATIENCE_S),
        )
        peaks.append(max((rank.peak_tensor_bytes or 0 for rank in outcome.ranks), default=math.nan))
        shop.report(f"{system}: tensors of {peaks[-1] / _MIB:.1f} MiB at {tokens} tokens")
    return (peaks[1] - peaks[0]) / (_GROWTH_LENGTHS[1] - _GROWTH_LENGTHS[0])


def _fits(shop: Workshop, job: Job, system: str) -> int:
    wanted = replace(job, system=system)
    patient = Cluster(timeout_s=_PATIENCE_S)
    return longest_sequence(
        wanted, start=2 * _K, limit=_LONGEST, halvings=1, cluster=patient, report=shop.report
    ).fits


def _length(tokens: int) -> str:
    if tokens == 0:
        return "none"
    return f"{tokens // _K}K" if tokens < _LONGEST else f"at least {tokens // _K}K"


def _ratio(ours: int, theirs: int) -> str:
    if theirs == 0:
        return "no ratio"
    return f"{'at least ' if ours >= _LONGEST else ''}{ours / theirs:.2g}x"


def _added_operations(job: Job) -> float:
    """What tiles add to the operations of a LightSeq rank, of all that it executes."""
    common = with_values(job.common, seq_length=_GROWTH_LENGTHS[1])
    tiled, whole = (
        hardware_flops(SYSTEMS[system].configure(common, job.world_size), VOCAB_SIZE)
        for system in ("lightseq-tiles", "lightseq")
    )
    return tiled / whole - 1


def against_rsa(shop: Workshop) -> list[Row]:
    """Row 3: Table 3."""
    job = replace(shop.job("llama-2h", 2, seq_length=2048), profile_memory=True)
    figures = shop.compare("3", job, "rsa", "lightseq")
    memory = {name: (row.peak_tensor_bytes or 0) / _MIB for name, row in figures.items()}
    return [
        Row(
            row="3",
            what="against Ring Self-Attention",
            paper="5.64x on one node, 4.45x on two; 8x the length",
            here=f"{shop.ratio('3', 'lightseq')} (2 processes, 2048 tokens); peak of tensors {memory['rsa']:.0f} "
            f"against {memory['lightseq']:.0f} MiB, growing with the square of the length against linearly",
        )
    ]


def against_ring_and_ulysses(shop: Workshop) -> list[Row]:
    """Row 4: the unbalanced ring, and Table 4."""
    job = shop.job("llama-33h", 2)
    shop.compare("4", job, "ulysses", "ring", "lightseq")
    measured = shop.comparisons["4"]
    seconds = {row.system: row.median_seconds for row in measured.figures}
    work = {name: _makespan(METHODS[name], 8) for name in ("ring", "lightseq")}
    cell = Cell("lightseq", 8, 256 * _K, LLAMA_7B)
    ring, balanced = (
        play(method, cell, Direction.FORWARD).makespan_s for method in (METHODS["ring"], PAPER_LIGHTSEQ)
    )
    pairs = [(cell, Cell("lightseq", cell.gpus, cell.seq_length, cell.model)) for cell in TABLE_4]
    published = [TABLE_4[theirs] / TABLE_1[ours] for theirs, ours in pairs]
    predicted = [iteration_seconds(theirs) / iteration_seconds(ours) for theirs, ours in pairs]
    return [
        Row(
            row="4",
            what="attention forward against the unbalanced ring",
            paper="1.67x on 8",
            here=f"iteration {seconds['ring'] / seconds['lightseq']:.2f}x on 2; work of the busiest of 8 ranks "
            f"{work['ring'] / work['lightseq']:.2f}x",
            predicted=f"{ring / balanced:.2f}x ({ring / balanced / 1.67 - 1:+.1%})",
            note="8 processes share the cores, so work is counted",
        ),
        Row(
            row="4",
            what="against DeepSpeed-Ulysses",
            paper=_range(published),
            here=f"{shop.ratio('4', 'lightseq')} (Llama-33H, 2 processes)",
            predicted=_range(predicted),
        ),
    ]


def recompute(shop: Workshop) -> list[Row]:
    """Row 5: Table 5."""
    rows = []
    for tokens in _RECOMPUTE_LENGTHS:
        label = f"5 {tokens}"
        job = shop.job("llama-8h", 2, seq_length=2 * tokens)
        shop.compare(label, job, "lightseq-plain-recompute", "lightseq")
        kept = iteration_seconds(Cell("lightseq", 8, 8 * tokens, LLAMA_7B))
        plain = iteration_seconds(Cell("lightseq-recompute", 8, 8 * tokens, LLAMA_7B))
        rows.append(
            Row(
                row="5",
                what=f"keeping attention on recomputation, {tokens} tokens a rank",
                paper=_TABLE_5_RATIOS.get(tokens, "-"),
                here=shop.ratio(label, "lightseq"),
                predicted=f"{plain / kept:.2f}x",
            )
        )
    return rows


_TABLE_5_RATIOS = {
    cell.seq_length // 8: f"{seconds / kept:.2f}x"
    for (cell, seconds), kept in zip(TABLE_5.items(), TABLE_5_KEPT.values(), strict=True)
}
"""By tokens per GPU."""


def overlap(shop: Workshop) -> list[Row]:
    """Row 6: with and without overlap. Needs a network: reads what compare_two_hosts.sh has left."""
    ratios = [_overlap_gain(thousands) for thousands in (128, 256, 512)]
    record = shop.output / "two-hosts.json"
    here = "run scripts/compare_two_hosts.sh first: on one host transfers take the cores that kernels need"
    if record.exists():
        here = ", ".join(
            f"{times['lightseq-no-overlap'] / times['lightseq']:.2f}x at {rate} Gbit/s"
            for rate, comparison in json.loads(record.read_text()).items()
            if {"lightseq", "lightseq-no-overlap"}
            <= set(times := {row["system"]: row["median_seconds"] for row in comparison["figures"]})
        )
    return [
        Row(
            row="6",
            what="overlap of transfers and kernels",
            paper="up to 1.32x on two nodes",
            here=here,
            predicted=f"{_range(ratios)} at 128K to 512K, two nodes",
        )
    ]


def _overlap_gain(thousands: int) -> float:
    cell = Cell("lightseq", 16, thousands * _K, LLAMA_7B)
    hidden, exposed = (
        LLAMA_7B.num_layers
        * sum(play(PAPER_LIGHTSEQ, cell, way, overlap=overlapped).makespan_s for way in Direction)
        for overlapped in (True, False)
    )
    rest = iteration_seconds(cell) - hidden
    return (rest + exposed) / (rest + hidden)


def balance(shop: Workshop) -> list[Row]:
    """Row 7: speed-up of attention forward by ranks, were communication free."""
    del shop
    methods = {
        "unbalanced ring": METHODS["ring"],
        "as published": PAPER_LIGHTSEQ,
        "ours": METHODS["lightseq"],
    }
    curves = {
        name: ", ".join(f"{_speedup(method, size):.2f}" for size in _CURVE)
        for name, method in methods.items()
    }
    cell = Cell("lightseq", 8, 256 * _K, LLAMA_7B)
    played = play(PAPER_LIGHTSEQ, cell, Direction.FORWARD, A100_CLUSTER)
    return [
        Row(
            row="7",
            what=f"load balance: speed-up over one rank at P = {', '.join(map(str, _CURVE))}; {name}",
            paper={"unbalanced ring": "4.5 at P = 8", "as published": "7.5 at P = 8 (7.2 in theory)"}.get(
                name, "-"
            ),
            here=curve,
            predicted=f"{played.busy * 8:.2f} at P = 8" if name == "as published" else "-",
            note="counted work: (query, key) pairs of the busiest rank, step by step",
        )
        for name, curve in curves.items()
    ]


def _makespan(method: Method, size: int) -> float:
    return simulate(build(method, SequenceLayout(method.default_layout, size))).makespan_s


def _speedup(method: Method, size: int) -> float:
    played = simulate(build(method, SequenceLayout(method.default_layout, size)))
    return played.busy * size


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2f}-{max(values):.2f}x"


EXPERIMENTS: Mapping[str, Callable[[Workshop], list[Row]]] = {
    "1": against_megatron,
    "2": longest,
    "3": against_rsa,
    "4": against_ring_and_ulysses,
    "5": recompute,
    "6": overlap,
    "7": balance,
}


def markdown(rows: Sequence[Row]) -> str:
    """The table."""
    header = ["row", "what", "paper", "here", "predicted for the paper's cluster", "note"]
    return markdown_table(header, [list(asdict(row).values()) for row in rows]) + "\n"


def _progress(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def main(arguments: Sequence[str]) -> int:
    """Run the rows asked for (default all); exit status 0 when every comparison's losses agree."""
    wanted = list(arguments[2:]) or list(EXPERIMENTS)
    shop = Workshop(
        configs=Path(arguments[0]),
        output=Path(arguments[1]),
        report=_progress,
    )
    rows = [row for number in wanted for row in EXPERIMENTS[number](shop)]
    shop.output.mkdir(parents=True, exist_ok=True)
    (shop.output / "paper-rows.md").write_text(markdown(rows))
    record = {
        "rows": [asdict(row) for row in rows],
        "comparisons": {label: made.to_dict() for label, made in shop.comparisons.items()},
    }
    (shop.output / "paper-rows.json").write_text(json.dumps(record, indent=1) + "\n")
    sys.stdout.write(markdown(rows))
    return 0 if all(made.agrees for made in shop.comparisons.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
