"""Packed documents with every method: how evenly work is shared, what is transferred, and what a plan costs.

Nothing is run: work is counted exactly, time is the simulator's, and only plans are timed. Shards are in units of one
rank's queries.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megatron_lightseq.errors import UnsupportedError
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule import (
    Chooser,
    Costs,
    Device,
    Direction,
    Method,
    Network,
    Payload,
    TensorShape,
    build,
    compile_program,
    resolve_method,
    simulate,
)
from megatron_lightseq.schedule.choose import seconds_per_pair
from megatron_lightseq.schedule.simulate import Profile
from megatron_lightseq.tools.bench.partitions import PARTITIONS, Partition
from megatron_lightseq.tools.lengths import draw
from megatron_lightseq.tools.markdown import markdown_table
from megatron_lightseq.tools.provenance import processor, versions

METHODS_COMPARED = ("balanced", "lightseq", "zigzag", "all_gather", "ulysses")
QUERY_HEADS, HEAD_DIM = 64, 128
_PARTITION_STEPS = 8
"""Assumed number of steps in which the keys of a partition arrive, each overlapped with the previous one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRow:
    """One method on one distribution of lengths: means over the draws."""

    method: str
    cp_size: int
    lengths: str
    kv_ratio: float
    """Key/value heads over query heads."""
    direction: str
    totals: float
    """Mean over busiest rank, by all pairs that ranks compute."""
    barrier: float
    """The same if ranks waited for each other after every step."""
    busiest_bytes: float
    """The most that any rank sends or receives, in bytes of one rank's queries."""
    plan_ms: float
    """CPU time of a schedule and one rank's program, in ms, median; 0 for partitions that are only counted."""
    simulated: float
    """Ideal over simulated time on H100s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedCase:
    """What is drawn and measured."""

    cp_size: int
    tokens_per_rank: int
    lengths: str
    kv_ratio_inverse: int
    direction: Direction
    network: Network
    draws: int
    seed: int

    @property
    def shape(self) -> TensorShape:
        """bf16 heads as in a 70B model."""
        return TensorShape(
            num_heads=QUERY_HEADS,
            num_query_groups=QUERY_HEADS // self.kv_ratio_inverse,
            head_dim=HEAD_DIM,
            element_bytes=2,
        )

    def borders(self) -> Iterator[Sequence[int]]:
        """The documents of every draw."""
        for index in range(1 if self.lengths == "causal" else self.draws):
            yield draw(self.lengths, self.cp_size * self.tokens_per_rank, self.seed + index)


def measure(case: PackedCase, methods: Sequence[str] = METHODS_COMPARED) -> list[PackedRow]:
    """A row per method that can compute the case, and one per partition of other systems."""
    rows = []
    for name in methods:
        try:
            figures = [_of_method(resolve_method(name), case, borders) for borders in case.borders()]
        except UnsupportedError:
            continue
        rows.append(_row(name, case, figures))
    for name, partition in PARTITIONS.items():
        figures = [_of_partition(partition, case, borders) for borders in case.borders()]
        rows.append(_row(name, case, figures))
    return rows


@dataclass(frozen=True, slots=True)
class _Figures:
    totals: float
    barrier: float
    busiest_bytes: float
    plan_ms: float
    simulated: float


def _row(name: str, case: PackedCase, figures: Sequence[_Figures]) -> PackedRow:
    return PackedRow(
        method=name,
        cp_size=case.cp_size,
        lengths=case.lengths,
        kv_ratio=1 / case.kv_ratio_inverse,
        direction=str(case.direction),
        totals=statistics.mean(one.totals for one in figures),
        barrier=statistics.mean(one.barrier for one in figures),
        busiest_bytes=statistics.mean(one.busiest_bytes for one in figures),
        plan_ms=statistics.median(one.plan_ms for one in figures),
        simulated=statistics.mean(one.simulated for one in figures),
    )


def _of_method(method: Method, case: PackedCase, borders: Sequence[int]) -> _Figures:
    layout = SequenceLayout(method.default_layout, case.cp_size)
    mask = Mask.documents(borders)
    began = time.process_time()
    schedule = build(
        method,
        layout,
        mask=mask,
        direction=case.direction,
        seq_length=borders[-1],
        shape=case.shape,
        network=case.network,
    )
    compile_program(schedule, 0)
    plan_ms = (time.process_time() - began) * 1e3
    chooser = Chooser(case.cp_size, borders[-1], mask)
    predicted = chooser.predict(method.name, layout.name, case.direction, case.shape, case.network)
    ideal_s = schedule.areas.total * seconds_per_pair(case.shape, case.direction, Device()) / case.cp_size
    profile = Profile.of(schedule)
    played = simulate(profile, shape=case.shape)
    sent = 0 if method.exchanges_heads else max(played.bytes_sent)
    return _Figures(
        totals=ideal_s / predicted.compute_s,
        barrier=_mean(profile) / sum(max(pairs) for pairs, _ in profile.steps),
        busiest_bytes=max(predicted.bytes_received, sent) / _shard_bytes(case),
        plan_ms=plan_ms,
        simulated=ideal_s / predicted.seconds,
    )


def _of_partition(
    partition: Callable[[Sequence[int], int], Partition], case: PackedCase, borders: Sequence[int]
) -> _Figures:
    shares = partition(borders, case.cp_size)
    profile = Profile(
        case.cp_size,
        case.tokens_per_rank,
        tuple(_partition_step(shares, case, step) for step in range(_PARTITION_STEPS)),
    )
    pair_s = seconds_per_pair(case.shape, case.direction, Device())
    played = simulate(profile, Costs(seconds_per_pair=pair_s, network=case.network), case.shape)
    totals = sum(shares.pairs) / len(shares.pairs) / max(shares.pairs)
    return _Figures(
        totals=totals,
        barrier=totals,
        busiest_bytes=max(*played.bytes_sent, *played.bytes_received) / _shard_bytes(case),
        plan_ms=0.0,
        simulated=sum(shares.pairs) * pair_s / case.cp_size / played.makespan_s,
    )


def _partition_step(
    shares: Partition, case: PackedCase, step: int
) -> tuple[tuple[int, ...], tuple[tuple[Payload, int, int, int], ...]]:
    """An equal part of the pairs and of the keys, which come from the rank before; in backward, gradients go back."""
    pairs = tuple(pairs // _PARTITION_STEPS for pairs in shares.pairs)
    transfers: list[tuple[Payload, int, int, int]] = []
    for rank, keys in enumerate(shares.keys):
        source, tokens = (rank - 1) % case.cp_size, keys // (_PARTITION_STEPS - 1)
        if step < _PARTITION_STEPS - 1:
            transfers.append((Payload.KV, source, rank, tokens))
        if step > 0 and case.direction is Direction.BACKWARD:
            transfers.append((Payload.DKV, rank, source, tokens))
    return pairs, tuple(transfers)


def _mean(profile: Profile) -> float:
    return sum(sum(pairs) for pairs, _ in profile.steps) / profile.cp_size


def _shard_bytes(case: PackedCase) -> int:
    return case.tokens_per_rank * case.shape.bytes_per_token(Payload.Q)


HEADER = tuple(field.name for field in fields(PackedRow))


def cells(row: PackedRow) -> list[str]:
    """A row of the table."""
    values = asdict(row)
    return [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values.values()]


def caption(draws: int) -> str:
    """How to read the table, and where plans were timed."""
    return (
        "totals and barrier: mean over busiest rank, over the whole pass and step by step; busiest_bytes: in one "
        f"rank's queries; plan_ms: CPU time on {processor()}; simulated: ideal over simulated time on H100s. "
        f"Means of {draws} draws. The last two methods are counted, not run, without what short pieces cost in kernels."
    )


def summary(rows: Sequence[PackedRow]) -> str:
    """One line per method, one column per distribution: totals forward, and simulated time forward and backward."""
    lengths = list(dict.fromkeys(row.lengths for row in rows))
    found = {(row.method, row.lengths, row.direction): row for row in rows}

    def cell(method: str, name: str) -> str:
        forward, backward = (found.get((method, name, str(direction))) for direction in Direction)
        if forward is None or backward is None:
            return "-"
        return f"{forward.totals:.2f}, {forward.simulated:.2f} / {backward.simulated:.2f}"

    methods = dict.fromkeys(row.method for row in rows)
    return markdown_table(("method", *lengths), [[m, *(cell(m, name) for name in lengths)] for m in methods])


def write_json(rows: Sequence[PackedRow], path: Path, command: str, draws: int) -> list[Path]:
    """The rows with machine and versions, and next to them a summary as a Markdown table."""
    document = {
        "command": command,
        "cpu": processor(),
        "versions": versions(),
        "rows": [asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    table = path.with_suffix(".md")
    first = rows[0]
    text = (
        f"Each cell: mean over busiest rank by the pairs of a forward pass, then ideal over simulated time on H100s, "
        f"forward / backward. {first.cp_size} ranks, {round(1 / first.kv_ratio)} query heads per key/value head, "
        f"means of {draws} draws. The last two rows are partitions that other systems use: counted, not run, without "
        f"what short pieces cost in kernels. `{command}`"
    )
    table.write_text(f"{summary(rows)}\n\n{text}\n")
    return [path, table]
