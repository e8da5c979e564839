"""`lightseq bench kernel`: our CPU attention kernel beside torch's, speed and error."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_lightseq.errors import ConfigError, explain


def run(arguments: Sequence[str]) -> int:
    """Measure, print a table, and write it as JSON, Markdown and PNG when asked."""
    options = _parser().parse_args(arguments)
    if options.threads < 1 or options.repetitions < 1:
        raise ConfigError(
            explain(
                got=f"--threads {options.threads}, --repetitions {options.repetitions}",
                rule="both are 1 or more",
                remedy="Use --threads 1 for the steadiest figures",
            )
        )
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        return _bench_kernel(options)
    finally:
        torch.set_num_threads(before)


def _bench_kernel(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from megatron_lightseq.bench.cases import standard_cases
    from megatron_lightseq.bench.measure import Row, run_cases
    from megatron_lightseq.bench.report import HEADER, caption, cells, write_reports
    from megatron_lightseq.kernels.extension import load_extension

    load_extension()
    cases = [case for case in standard_cases() if options.only in str(case)]
    if not cases:
        raise ConfigError(
            explain(
                got=f"--only {options.only!r}",
                rule="no case has it in its name",
                remedy=f"A name is like {str(standard_cases()[0])!r}",
            )
        )

    def say(row: Row) -> None:
        sys.stderr.write(f"{row.case}: {row.ratio('total_s'):.2f}x\n")

    rows = run_cases(cases, options.repetitions, say)
    table = Table(*HEADER)
    for row in rows:
        table.add_row(*cells(row))
    console = Console()
    console.print(table)
    console.print(caption(options.repetitions))
    if options.out is not None:
        for path in write_reports(rows, options.out, options.repetitions):
            console.print(f"written: {path}")
    return 0


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="lightseq bench",
        allow_abbrev=False,
        description="Time our fused CPU attention and torch's fused SDPA in one process, taking turns, and compare "
        "both with fp64.",
    )
    made.add_argument("what", choices=("kernel",), help="what to measure")
    made.add_argument(
        "--threads", type=int, default=1, metavar="N", help="default: 1, timed by thread CPU time"
    )
    made.add_argument(
        "--repetitions", type=int, default=5, metavar="N", help="median of so many (default: 5)"
    )
    made.add_argument(
        "--only", default="", metavar="TEXT", help="only cases with TEXT in their name, e.g. 'causal bf16'"
    )
    made.add_argument(
        "--out", type=Path, metavar="DIR", help="also write cpu-kernel.json, .md and .png there"
    )
    return made
