"""`lightseq schedule --method lightseq --cp 8`: which rank computes what, when, and at what cost."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_lightseq.cli.scans import TRANSITIONS, scan_text
from megatron_lightseq.errors import ConfigError, explain
from megatron_lightseq.layout import LAYOUTS, SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule import (
    NETWORKS,
    Network,
    Schedule,
    TensorShape,
    build,
    method_forms,
    rank_methods,
    reason,
    resolve_method,
    simulate,
)
from megatron_lightseq.schedule.scan_place import SCANS
from megatron_lightseq.tools.lengths import DISTRIBUTIONS, draw

TOKENS_PER_RANK = 8192
"""Used with --method auto if no sequence length is given."""


def run(arguments: Sequence[str]) -> int:
    """Print a schedule and its figures; also draw it on request."""
    options = _parser().parse_args(arguments)
    _check(options)
    if options.scan is not None:
        mask, seq_length = _masked_sequence(options)
        sys.stdout.write(scan_text(options, mask, seq_length))
        return 0
    shape = TensorShape(
        num_heads=options.heads,
        num_query_groups=options.groups or options.heads,
        head_dim=options.head_dim,
        element_bytes=2 if options.dtype == "bf16" else 4,
    )
    if options.method == "auto":
        sys.stdout.write(ranking(options, shape))
        return 0
    method = resolve_method(options.method)
    mask, seq_length = _masked_sequence(options)
    schedule = build(
        method,
        SequenceLayout(options.layout or method.default_layout, options.cp),
        mask=mask,
        direction=options.direction,
        seq_length=seq_length,
        shape=shape,
        network=Network.parse(options.network),
    )
    sys.stdout.write(f"{schedule}\n\n{figures(schedule, shape)}\n")
    if options.png is not None:
        from megatron_lightseq.training.reporting.plots import draw_schedule

        draw_schedule(schedule, options.png)
        sys.stdout.write(f"drawn in        {options.png}\n")
    return 0


def ranking(options: argparse.Namespace, shape: TensorShape) -> str:
    """All methods by predicted time on the requested network, best first, and why the first one wins."""
    network = Network.parse(options.network)
    mask, seq_length = _masked_sequence(options)
    seq_length = seq_length or options.cp * TOKENS_PER_RANK
    layouts = None if options.layout is None else (options.layout,)
    choices = rank_methods(options.cp, shape, seq_length, mask=mask, network=network, layouts=layouts)
    title = (
        f"{options.cp} ranks, {seq_length} tokens, {shape.num_heads} heads, {shape.num_query_groups} key/value heads, "
        f"{network.name}: forward and backward of one layer, simulated"
    )
    return "\n".join([title, *map(str, choices), "", reason(choices), ""])


def _masked_sequence(options: argparse.Namespace) -> tuple[Mask, int | None]:
    """The mask asked for, within documents if their lengths are, and the sequence length, if it is known."""
    mask = Mask.parse(options.mask)
    if options.lengths is None:
        return mask, options.seq_length
    seq_length = options.seq_length or options.cp * TOKENS_PER_RANK
    return mask & Mask.documents(draw(options.lengths, seq_length, options.seed), causal=False), seq_length


def figures(schedule: Schedule, shape: TensorShape) -> str:
    """Makespan, busy fraction and bytes, one per line; the unit of time is one full tile of a rank's tokens."""
    played = simulate(schedule, shape=shape)
    sent, received = played.bytes_sent, played.bytes_received
    return "\n".join(
        [
            f"fingerprint     {schedule.fingerprint}",
            f"steps           {len(schedule.steps)}",
            f"makespan        {played.makespan_s:.3f} tiles (ideal {played.ideal_s:.3f})",
            f"busy            {played.busy:.1%}",
            f"sent per rank   {_range(sent)}, {_megabytes(sum(sent))} in total",
            f"received        {_range(received)}",
        ]
    )


def _range(sizes: Sequence[int]) -> str:
    low, high = min(sizes), max(sizes)
    return _megabytes(low) if low == high else f"{_megabytes(low)} to {_megabytes(high)}"


def _megabytes(size: int) -> str:
    return f"{size / 2**20:,.2f} MiB"


def _check(options: argparse.Namespace) -> None:
    groups = options.groups or options.heads
    if min(options.cp, options.heads, groups, options.head_dim) < 1 or options.heads % groups:
        raise ConfigError(
            explain(
                got=f"--cp {options.cp}, --heads {options.heads}, --groups {groups}, --head-dim {options.head_dim}",
                rule="all are 1 or more, and the number of groups divides the number of heads",
                remedy=f"Set --groups to a divisor of {options.heads}",
            )
        )


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="lightseq schedule",
        allow_abbrev=False,
        description="Print the schedule of distributed attention: tiles by rank and step (q5k2: queries of chunk 5, "
        "keys of chunk 2), and the transfers that are overlapped with them.",
    )
    made.add_argument(
        "--method",
        default="lightseq",
        help=f"one of {', '.join(method_forms())}; auto ranks them all (default: lightseq)",
    )
    made.add_argument(
        "--scan",
        choices=("auto", *SCANS),
        help="print how the states of linear attention travel, instead of tiles (m2: what chunk 2 does to a state, "
        "s0-2: the state behind chunks 0 to 2, s0-1*m2: a fold of both); auto ranks all scans",
    )
    made.add_argument(
        "--transition",
        choices=tuple(TRANSITIONS),
        default="matrix",
        help="with --scan: what tokens multiply a state by (default: matrix, as the delta rule does)",
    )
    made.add_argument(
        "--network",
        default="nvlink+100gbps",
        help=f"with --method auto or --scan: one of {', '.join(NETWORKS)}, or values such as link=450GB/s,latency=5us,"
        "ranks_per_node=8,nic=50GB/s,nic_latency=10us (default: nvlink+100gbps)",
    )
    made.add_argument(
        "--cp", type=int, default=4, metavar="P", help="number of context parallel ranks (default: 4)"
    )
    made.add_argument("--layout", choices=tuple(LAYOUTS), help="default: the default layout of the method")
    made.add_argument("--direction", choices=("forward", "backward"), default="forward")
    made.add_argument(
        "--mask", default="causal", help="text form of a mask, for example window(512,0) (default: causal)"
    )
    made.add_argument(
        "--seq-length", type=int, metavar="N", help="tokens over all ranks (default: 1024 per chunk)"
    )
    made.add_argument(
        "--lengths",
        metavar="NAME",
        help=f"pack documents of these lengths (one of {', '.join(DISTRIBUTIONS)}) into {TOKENS_PER_RANK} tokens per "
        "rank or into --seq-length",
    )
    made.add_argument("--seed", type=int, default=0, help="of the lengths drawn (default: 0)")
    made.add_argument("--heads", type=int, default=32, metavar="H", help="query heads (default: 32)")
    made.add_argument(
        "--groups", type=int, metavar="G", help="key/value heads (default: the number of query heads)"
    )
    made.add_argument("--head-dim", type=int, default=128, metavar="D", help="head dimension (default: 128)")
    made.add_argument(
        "--dtype", choices=("bf16", "fp32"), default="bf16", help="dtype of the inputs (default: bf16)"
    )
    made.add_argument("--png", type=Path, metavar="FILE", help="also draw the schedule")
    return made
