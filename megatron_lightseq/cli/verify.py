"""`lightseq verify`: the parity matrix, with PASS or FAIL and numbers for each cell."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from megatron_lightseq.config import PretrainConfig
from megatron_lightseq.config.flat import to_flat
from megatron_lightseq.config.load import parse_config
from megatron_lightseq.errors import ConfigError, explain
from megatron_lightseq.tools.verify.cells import CELLS, select
from megatron_lightseq.training.job.launch import Launch

USER_KEYS = ("num_layers", "hidden_size", "ffn_hidden_size", "kv_channels", "seq_length", "seed", "cp_kernel")
"""Keys that a user may change for all cells; heads, ranks and methods are what distinguishes the cells."""


def run(arguments: Sequence[str]) -> int:
    """Verify; exit status 0 if all cells pass, 1 otherwise."""
    options, rest = _parser().parse_known_args(arguments)
    extra = _extra(rest)
    launch = Launch.from_environment()
    if options.list:
        sys.stdout.write("".join(f"{cell.world_size} processes  {cell.name}\n" for cell in CELLS))
        return 0

    from megatron_lightseq.tools.verify.ranks import launched_ranks, local_ranks, most_processes

    if launch.world_size > 1:
        from megatron_lightseq.training.job.leave import leave_store

        verification = launched_ranks(launch, select(options.cells, launch.world_size), extra)
        status = 0
        if launch.rank > 0:
            verification.follow()
        else:
            status = _print(verification.lead(), len(verification.cells), 0)
        leave_store(
            verification.store, rank=launch.rank, world_size=launch.world_size, store_host=launch.store_host
        )
        return status
    most = most_processes(options.processes)
    cells = select(options.cells, most)
    with local_ranks(max(cell.world_size for cell in cells), cells, extra) as verification:
        return _print(verification.lead(), len(cells), len(select(options.cells, sys.maxsize)) - len(cells))


def _print(reports: Iterable[Any], total: int, left_out: int) -> int:
    began, passed, seen = time.perf_counter(), 0, 0
    width = max(len(cell.name) for cell in CELLS)
    sys.stdout.write(
        f"      {'cell'.ljust(width)}  ranks  loss      grad norm gradients allowed (worst parameter)\n"
    )
    for report in reports:
        seen += 1
        passed += report.passed
        word = "PASS" if report.passed else "FAIL"
        sys.stdout.write(
            f"{word}  {report.cell.name.ljust(width)}  {report.cell.world_size:<5d}  {_numbers(report)}\n"
        )
        sys.stdout.flush()
    seconds = time.perf_counter() - began
    skipped = f", {left_out} not run because they need more processes" if left_out else ""
    unseen = f", {total - seen} not reached because a process died" if seen < total else ""
    sys.stdout.write(f"{passed} of {total} cells passed in {seconds:.0f} s{skipped}{unseen}\n")
    return 0 if passed == total else 1


def _numbers(report: Any) -> str:
    if report.verdict is None:
        return str(report.error)
    verdict = report.verdict
    return (
        f"{verdict.loss:.1e}   {verdict.grad_norm:.1e}   {verdict.gradient:.1e}   {verdict.tolerance.gradient:.1e} "
        f"({verdict.parameter}), {report.seconds:.1f} s"
    )


def _extra(arguments: Sequence[str]) -> dict[str, Any]:
    """The values that the user sets for all cells; raises ConfigError for keys that cells set themselves."""
    values, defaults = to_flat(parse_config(arguments)), to_flat(PretrainConfig())
    changed = {key: value for key, value in values.items() if value != defaults[key]}
    refused = [key for key in changed if key not in USER_KEYS]
    if refused:
        raise ConfigError(
            explain(
                got=", ".join(refused),
                rule=f"the cells set this themselves; keys that can be set for all cells are {', '.join(USER_KEYS)}",
                remedy="Remove it, and select cells with --cells",
            )
        )
    return changed


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="lightseq verify",
        allow_abbrev=False,
        description="Train a small model for one step in every combination of method and parallelism. Compare the "
        "loss, the gradient norm and the gradient of every parameter with a single process that runs Megatron's own "
        "attention. In bf16 the reference is that process in fp32, and the error may be twice that of Megatron in "
        "bf16. Starts processes on this machine; under torchrun, uses the processes that it started.",
        epilog=f"These keys can be set for all cells: {', '.join('--' + key.replace('_', '-') for key in USER_KEYS)}.",
    )
    made.add_argument("--cells", metavar="REGEX", help="only cells whose names match")
    made.add_argument(
        "--processes", type=int, metavar="N", help="only cells that need at most N processes (default: 8)"
    )
    made.add_argument("--list", action="store_true", help="print the names of the cells and exit")
    return made
