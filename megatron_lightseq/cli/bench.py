"""`lightseq bench`: the CPU attention kernel against torch's and on several threads, and how well communication is
overlapped with computation."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lightseq.cli.network_flags import add_network_flags
from megatron_lightseq.errors import ConfigError, LightSeqError, explain
from megatron_lightseq.schedule import METHODS

if TYPE_CHECKING:
    from megatron_lightseq.tools.bench.cases import KernelCase
    from megatron_lightseq.tools.bench.measure import Row


def overlapped_methods() -> list[str]:
    """Methods whose overlap is measured by default."""
    return [name for name, method in METHODS.items() if not method.full_rows]


def run(arguments: Sequence[str]) -> int:
    """Measure, print a table, and write files on request."""
    options = _parser().parse_args(arguments)
    measure: Callable[[argparse.Namespace], int] = options.measure
    return measure(options)


def _bench_kernel(options: argparse.Namespace) -> int:
    _check_counts(threads=options.threads, repetitions=options.repetitions)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as scripts/pretrain_gpt.sh does
    from megatron_lightseq.tools.bench.clock import torch_threads

    with torch_threads(options.threads):
        return _compare_kernels(options)


def _compare_kernels(options: argparse.Namespace) -> int:
    from megatron_lightseq.kernels.extension import load_extension
    from megatron_lightseq.tools.bench.cases import standard_cases
    from megatron_lightseq.tools.bench.measure import run_cases
    from megatron_lightseq.tools.bench.report import HEADER, caption, cells, write_reports

    load_extension()
    cases = _selected(standard_cases(), options.only)

    def progress(row: Row) -> None:
        sys.stderr.write(f"{row.case}: {row.ratio('total_s'):.2f}x\n")

    rows = run_cases(cases, options.repetitions, progress)
    written = [] if options.out is None else write_reports(rows, options.out, options.repetitions)
    _show(HEADER, [cells(row) for row in rows], caption(options.repetitions), written)
    return 0


def _bench_linear(options: argparse.Namespace) -> int:
    _check_counts(repetitions=options.repetitions)
    from megatron_lightseq.tools.bench import linear

    def progress(row: linear.LinearRow) -> None:
        sys.stderr.write(f"{row.family}, {row.tokens}: {row.seconds[1] / row.seconds[0]:.2f}x\n")

    lengths = [int(length) for length in options.lengths.split(",")]
    _check_counts(lengths=min(lengths))
    rows = linear.measure(lengths, options.repetitions, progress)
    written = [] if options.out is None else linear.write_reports(rows, options.out, options.repetitions)
    _show(linear.HEADER, [row.cells() for row in rows], linear.caption(options.repetitions), written)
    return 0


def _bench_packed(options: argparse.Namespace) -> int:
    from megatron_lightseq.schedule import Direction, Network
    from megatron_lightseq.tools.bench import packed
    from megatron_lightseq.tools.lengths import PACKED

    _check_counts(cp=options.cp, tokens_per_rank=options.tokens_per_rank, draws=options.draws)
    rows = []
    for lengths in options.lengths.split(",") if options.lengths else PACKED:
        for direction in Direction:
            case = packed.PackedCase(
                cp_size=options.cp,
                tokens_per_rank=options.tokens_per_rank,
                lengths=lengths,
                kv_ratio_inverse=options.query_heads_per_kv_head,
                direction=direction,
                network=Network.parse(options.network),
                draws=options.draws,
                seed=options.seed,
            )
            rows += packed.measure(case, options.methods.split(","))
            sys.stderr.write(f"{lengths} {direction}: done\n")
    written = (
        []
        if options.json is None
        else packed.write_json(rows, options.json, _command(options), options.draws)
    )
    _show(packed.HEADER, [packed.cells(row) for row in rows], packed.caption(options.draws), written)
    return 0


def _command(options: argparse.Namespace) -> str:
    size = f"--cp {options.cp} --tokens-per-rank {options.tokens_per_rank}"
    return f"lightseq bench packed {size} --draws {options.draws} --seed {options.seed} --json {options.json}"


def _selected(cases: Sequence[KernelCase], only: str) -> list[KernelCase]:
    chosen = [case for case in cases if only in str(case)]
    if not chosen:
        raise ConfigError(
            explain(
                got=f"--only {only!r}",
                rule="no case has this text in its name",
                remedy=f"A name looks like {str(cases[0])!r}",
            )
        )
    return chosen


def _bench_scaling(options: argparse.Namespace) -> int:
    from megatron_lightseq.kernels.extension import load_extension
    from megatron_lightseq.tools.bench import scaling

    _check_counts(threads=options.threads, repetitions=options.repetitions)
    load_extension()
    rows = [
        scaling.measure_scaling(case, options.threads, options.repetitions)
        for case in _selected(scaling.scaling_cases(), options.only)
    ]
    written = [] if options.out is None else scaling.write_reports(rows, options.out, options.repetitions)
    _show(
        scaling.HEADER,
        [row.cells() for row in rows],
        scaling.caption(options.threads, options.repetitions),
        written,
    )
    return 0


def _bench_overlap(options: argparse.Namespace) -> int:
    from megatron_lightseq.tools.bench import overlap_report
    from megatron_lightseq.tools.bench.overlap import TASK, OverlapJob
    from megatron_lightseq.tools.ranks import Cluster, run_task

    _check_counts(repetitions=options.repetitions)
    job = OverlapJob(
        methods=tuple(options.methods.split(",")),
        seq_length=options.seq_length,
        num_heads=options.num_attention_heads,
        num_query_groups=options.num_query_groups or options.num_attention_heads,
        head_dim=options.kv_channels,
        precision="bf16" if options.bf16 else "fp32",
        repetitions=options.repetitions,
    )
    job.check(options.ranks)
    cluster = Cluster.of(options.network_namespaces, options.interface, timeout_s=600.0)
    answers = run_task(TASK, job.to_json(), options.ranks, cluster)
    if answers.failure is not None:
        raise LightSeqError(answers.failure)
    rows = overlap_report.rows(job, answers.by_rank)
    written = []
    if options.out is not None:
        written = overlap_report.write(job, answers.by_rank, options.link, options.out, options.name)
    _show(
        overlap_report.HEADER,
        [row.cells() for row in rows],
        overlap_report.caption(job, answers.by_rank, options.link),
        written,
    )
    return 0


def _show(
    header: Sequence[str], rows: Sequence[Sequence[str]], caption: str, written: Sequence[Path]
) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(table)
    console.print(caption, markup=False)
    for path in written:
        console.print(f"written: {path}", markup=False)


def _check_counts(**counts: int) -> None:
    if min(counts.values()) < 1:
        raise ConfigError(
            explain(
                got=", ".join(f"--{name} {count}" for name, count in counts.items()),
                rule="each is 1 or more",
                remedy="Use --threads 1 for the most stable figures",
            )
        )


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="lightseq bench",
        allow_abbrev=False,
        description="Measure the CPU attention kernel against torch's and on several threads, and how well "
        "communication is overlapped with computation.",
    )
    what = made.add_subparsers(required=True, metavar="WHAT")
    _kernel_parser(
        what.add_parser(
            "kernel",
            allow_abbrev=False,
            help="the CPU attention kernel against torch's",
            description="Time our fused CPU attention kernel and torch's fused SDPA alternately in one process, and "
            "compare the results of both with fp64.",
        )
    )
    _scaling_parser(
        what.add_parser(
            "scaling",
            allow_abbrev=False,
            help="speed-up of the CPU attention kernel with several threads",
            description="Time our fused CPU attention kernel alternately on one thread and on several, by wall clock.",
        )
    )
    _packed_parser(
        what.add_parser(
            "packed",
            allow_abbrev=False,
            help="packed documents: balance, traffic and plan time, by method",
            description="Draw packed documents and compare how methods, and the partitions of other systems, share "
            "their work. Work and traffic are counted, time is simulated, and only plans are timed.",
        )
    )
    _linear_parser(
        what.add_parser(
            "linear",
            allow_abbrev=False,
            help="linear attention against softmax attention and Megatron's gated delta rule",
            description="Time linear attention on one thread beside our softmax kernel, and the gated delta rule "
            "beside Megatron's implementation in torch, alternately, and count the memory of both.",
        )
    )
    _overlap_parser(
        what.add_parser(
            "overlap",
            allow_abbrev=False,
            help="time lost to transfers, with and without overlap, by method",
            description="Run attention on several ranks with and without overlap, and compare the time that ranks wait "
            "for transfers with the simulator's prediction.",
        )
    )
    return made


def _kernel_parser(made: argparse.ArgumentParser) -> None:
    made.set_defaults(measure=_bench_kernel)
    made.add_argument(
        "--threads", type=int, default=1, metavar="N", help="default: 1, timed by CPU time of the thread"
    )
    _add_case_flags(made)
    made.add_argument(
        "--out", type=Path, metavar="DIR", help="also write cpu-kernel.json, .md and .png to DIR"
    )


def _scaling_parser(made: argparse.ArgumentParser) -> None:
    made.set_defaults(measure=_bench_scaling)
    made.add_argument("--threads", type=int, default=2, metavar="N", help="compared with one (default: 2)")
    _add_case_flags(made)
    made.add_argument("--out", type=Path, metavar="DIR", help="also write cpu-scaling.json and .md to DIR")


def _add_case_flags(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--repetitions", type=int, default=5, metavar="N", help="report the median of N (default: 5)"
    )
    made.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="only cases with TEXT in their name, for example 'causal bf16'",
    )


def _linear_parser(made: argparse.ArgumentParser) -> None:
    made.set_defaults(measure=_bench_linear)
    made.add_argument(
        "--lengths", default="1024,4096,16384", metavar="A,B", help="tokens (default: %(default)s)"
    )
    made.add_argument(
        "--repetitions", type=int, default=3, metavar="N", help="report the median of N (default: 3)"
    )
    made.add_argument("--out", type=Path, metavar="DIR", help="also write linear.json and linear.md to DIR")


def _packed_parser(made: argparse.ArgumentParser) -> None:
    made.set_defaults(measure=_bench_packed)
    made.add_argument("--cp", type=int, default=8, metavar="P", help="context parallel ranks (default: 8)")
    made.add_argument(
        "--tokens-per-rank", type=int, default=8192, metavar="N", help="shard length (default: 8192)"
    )
    made.add_argument(
        "--lengths", metavar="A,B", help="length distributions (default: the six of packed training)"
    )
    made.add_argument(
        "--methods",
        default="balanced,lightseq,zigzag,all_gather,ulysses",
        metavar="A,B",
        help="default: %(default)s",
    )
    made.add_argument(
        "--query-heads-per-kv-head",
        type=int,
        default=8,
        metavar="N",
        help="1, 2, 4 ... 64: more make keys cheaper to move (default: 8)",
    )
    made.add_argument("--network", default="nvlink+8x400gbps", metavar="NET", help="default: %(default)s")
    made.add_argument("--draws", type=int, default=20, metavar="K", help="average over K draws (default: 20)")
    made.add_argument("--seed", type=int, default=0, metavar="S", help="of the first draw (default: 0)")
    made.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="also write the rows to FILE, and a table to FILE with .md for .json",
    )


def _overlap_parser(made: argparse.ArgumentParser) -> None:
    made.set_defaults(measure=_bench_overlap)
    made.add_argument(
        "--methods", default=",".join(overlapped_methods()), metavar="A,B", help="default: %(default)s"
    )
    made.add_argument("--ranks", type=int, default=2, metavar="N", help="processes (default: 2)")
    made.add_argument(
        "--seq-length", type=int, default=8192, metavar="N", help="tokens over all ranks (default: 8192)"
    )
    made.add_argument("--num-attention-heads", type=int, default=4, metavar="N", help="default: 4")
    made.add_argument("--num-query-groups", type=int, metavar="N", help="default: the number of heads")
    made.add_argument("--kv-channels", type=int, default=64, metavar="N", help="head dim (default: 64)")
    made.add_argument("--bf16", action="store_true", help="use bf16 instead of fp32")
    made.add_argument(
        "--repetitions", type=int, default=5, metavar="N", help="report the median of N (default: 5)"
    )
    add_network_flags(made)
    made.add_argument(
        "--link",
        default="loopback",
        metavar="TEXT",
        help="name of the link in the report (default: %(default)s)",
    )
    made.add_argument("--out", type=Path, metavar="DIR", help="also write NAME.json and NAME.md to DIR")
    made.add_argument("--name", default="overlap", help="base name of these files (default: %(default)s)")
