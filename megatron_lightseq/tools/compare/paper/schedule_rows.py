"""Rows 6 and 7: overlap of communication and computation, and load balance."""

from __future__ import annotations

import json

from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.schedule import METHODS, Direction, Method, Simulation, build, simulate
from megatron_lightseq.tools.compare.paper.experiment import Experiments, K, Row, value_range
from megatron_lightseq.tools.compare.paper.model import (
    PAPER_LIGHTSEQ,
    iteration_seconds,
    simulate_attention,
)
from megatron_lightseq.tools.compare.paper.published import LLAMA_7B, Cell
from megatron_lightseq.tools.planner.rates import A100_CLUSTER

_CURVE = (2, 3, 4, 5, 8, 16, 32)
"""Numbers of ranks in row 7."""


def overlap(experiments: Experiments) -> list[Row]:
    """Row 6: with and without overlap. Needs a network, so it reads the record of compare_two_hosts.sh."""
    ratios = [_overlap_gain(thousands) for thousands in (128, 256, 512)]
    record = experiments.output / "two-hosts.json"
    here = (
        "run scripts/compare_two_hosts.sh first: on a single host, transfers compete with kernels for cores"
    )
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
            predicted=f"{value_range(ratios)} at 128K to 512K, two nodes",
        )
    ]


def _overlap_gain(thousands: int) -> float:
    cell = Cell("lightseq", 16, thousands * K, LLAMA_7B)
    overlapped, serial = (
        LLAMA_7B.num_layers
        * sum(
            simulate_attention(PAPER_LIGHTSEQ, cell, direction, overlap=overlaps).makespan_s
            for direction in Direction
        )
        for overlaps in (True, False)
    )
    rest = iteration_seconds(cell) - overlapped
    return (rest + serial) / (rest + overlapped)


def balance(experiments: Experiments) -> list[Row]:
    """Row 7: speed-up of the attention forward pass over one rank, without the cost of communication."""
    del experiments
    methods = {
        "unbalanced ring": METHODS["ring"],
        "as published": PAPER_LIGHTSEQ,
        "ours": METHODS["lightseq"],
    }
    published = {"unbalanced ring": "4.5 at P = 8", "as published": "7.5 at P = 8 (7.2 in theory)"}
    cell = Cell("lightseq", 8, 256 * K, LLAMA_7B)
    simulated = simulate_attention(PAPER_LIGHTSEQ, cell, Direction.FORWARD, A100_CLUSTER)
    return [
        Row(
            row="7",
            what=f"load balance: speed-up over one rank for P = {', '.join(map(str, _CURVE))}; {name}",
            paper=published.get(name, "-"),
            here=", ".join(f"{_simulated(method, size).busy * size:.2f}" for size in _CURVE),
            predicted=f"{simulated.busy * 8:.2f} at P = 8" if name == "as published" else "-",
            note="counted work: (query, key) pairs of the busiest rank in each step",
        )
        for name, method in methods.items()
    ]


def makespan(method: Method, size: int) -> float:
    """Duration of a method's forward schedule in tiles, if transfers take no time."""
    return _simulated(method, size).makespan_s


def _simulated(method: Method, size: int) -> Simulation:
    return simulate(build(method, SequenceLayout(method.default_layout, size)))
