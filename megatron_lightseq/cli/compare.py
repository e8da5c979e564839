"""`lightseq compare [CONFIG.yaml ...] [--key value ...]`: the same training run with several systems."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_lightseq.cli.network_flags import add_network_flags
from megatron_lightseq.config import parse_config
from megatron_lightseq.errors import ConfigError, explain
from megatron_lightseq.tools.compare import report
from megatron_lightseq.tools.compare.job import Job
from megatron_lightseq.tools.compare.run import common_config, run_comparison
from megatron_lightseq.tools.compare.systems import BASELINE, SYSTEMS, choose
from megatron_lightseq.tools.provenance import usable_cores
from megatron_lightseq.tools.ranks import Cluster

DEFAULTS = (
    "--num-layers=2",
    "--hidden-size=256",
    "--num-attention-heads=4",
    "--seq-length=4096",
    "--recompute-granularity=full",
    "--recompute-method=uniform",
    "--recompute-num-layers=1",
)
"""The model if no configuration file is given: small, with sequences that are long for its size."""


def run(arguments: Sequence[str]) -> int:
    """Compare systems, or predict the paper's tables; exit status 0 if all losses agree, 1 otherwise."""
    options, rest = _parser().parse_known_args(arguments)
    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 200)
    if options.paper:
        from megatron_lightseq.tools.compare.paper.show import show_paper

        return show_paper(console, options.output)
    systems = choose(options.systems, options.ranks)
    _check(options)
    from_file = any(not word.startswith("--") and word.endswith((".yaml", ".yml")) for word in rest)
    config = parse_config(rest if from_file else [*DEFAULTS, *rest])
    job = Job(
        system=options.baseline,
        common=common_config(config, options.ranks),
        world_size=options.ranks,
        warmup_steps=options.warmup,
        steps=options.steps,
        threads=options.threads or max(1, usable_cores() // options.ranks),
    )
    comparison = run_comparison(
        job,
        systems,
        baseline=options.baseline,
        rounds=options.rounds,
        cluster=Cluster.of(options.network_namespaces, options.interface, options.timeout),
        report=_progress,
    )
    console.print(report.terminal_table(comparison))
    console.print(report.verdict(comparison), markup=False)
    if options.output is not None:
        for path in report.write(comparison, options.output, options.name):
            sys.stdout.write(f"written: {path}\n")
    return 0 if comparison.agrees else 1


def _progress(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def _check(options: argparse.Namespace) -> None:
    numbers = {name: getattr(options, name) for name in ("ranks", "steps", "rounds")}
    if min(numbers.values()) < 1 or options.warmup < 0 or options.baseline not in SYSTEMS:
        raise ConfigError(
            explain(
                got=f"{', '.join(f'--{name} {value}' for name, value in numbers.items())}, "
                f"--warmup {options.warmup}, --baseline {options.baseline}",
                rule=f"counts are 1 or more, --warmup is 0 or more, and the systems are {', '.join(SYSTEMS)}",
                remedy="Correct the flag",
            )
        )


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="lightseq compare",
        allow_abbrev=False,
        description="Train the same model on the same text with several systems, one after another, and compare "
        "speed, memory and traffic. Other arguments are configuration files and keys as in `lightseq pretrain`.",
    )
    made.add_argument(
        "--systems", default="all", metavar="A,B", help=f"all (default), or a list of: {', '.join(SYSTEMS)}"
    )
    made.add_argument(
        "--baseline", default=BASELINE, help="system that speed-ups are relative to (default: %(default)s)"
    )
    made.add_argument("--ranks", type=int, default=2, metavar="N", help="processes (default: 2)")
    made.add_argument("--threads", type=int, metavar="N", help="threads per process (default: cores / ranks)")
    made.add_argument("--steps", type=int, default=3, metavar="N", help="timed steps (default: 3)")
    made.add_argument("--warmup", type=int, default=1, metavar="N", help="steps before them (default: 1)")
    made.add_argument(
        "--rounds", type=int, default=1, metavar="N", help="runs of each system, in turns (default: 1)"
    )
    made.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="seconds for one run (default: 600)"
    )
    made.add_argument("--output", type=Path, metavar="DIR", help="write JSON, Markdown and a plot to DIR")
    made.add_argument("--name", default="compare", help="base name of these files (default: %(default)s)")
    add_network_flags(made)
    made.add_argument(
        "--paper",
        action="store_true",
        help="predict the iteration times published in the paper instead of training",
    )
    return made
