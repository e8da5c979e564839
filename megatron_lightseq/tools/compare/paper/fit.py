"""Fits the constants of the cost model: least squares on the logarithms of the cells (Levenberg-Marquardt)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from megatron_lightseq.tools.compare.paper.model import iteration_seconds
from megatron_lightseq.tools.compare.paper.published import FITTED, TABLE_1, Cell
from megatron_lightseq.tools.planner.rates import Rates

FREE = (
    "linear_flops_per_s",
    "attention_flops_per_s",
    "tile_flops_per_s",
    "node_collective_bytes_per_s",
    "node_link_bytes_per_s",
    "fixed_s",
)
"""Constants that are fitted; the others are measured properties of the hardware."""
START = Rates(
    linear_flops_per_s=200e12,
    attention_flops_per_s=180e12,
    tile_flops_per_s=180e12,
    node_collective_bytes_per_s=100e9,
    node_link_bytes_per_s=100e9,
    fixed_s=0.3,
)
"""From specifications: FlashAttention-2's published rates, and eight InfiniBand cards of 100 Gbps per node."""
_ITERATIONS = 40
_STEP = 1e-4
_LARGEST_CHANGE = 0.3


def fit(
    cells: Sequence[Cell] = FITTED, measured: Mapping[Cell, float] = TABLE_1, start: Rates = START
) -> Rates:
    """The constants that predict ``cells`` with the smallest squared relative error."""
    logs = np.log([getattr(start, name) for name in FREE])

    def constants(at: np.ndarray) -> Rates:
        return replace(start, **{name: math.exp(value) for name, value in zip(FREE, at, strict=True)})

    def residuals(at: np.ndarray) -> np.ndarray:
        tried = constants(at)
        return np.array([math.log(iteration_seconds(cell, tried) / measured[cell]) for cell in cells])

    found, damping = residuals(logs), 1e-2
    for _ in range(_ITERATIONS):
        slopes = np.stack(
            [(residuals(logs + _STEP * unit) - found) / _STEP for unit in np.eye(len(logs))], axis=1
        )
        normal = slopes.T @ slopes + damping * np.eye(len(logs))
        change = np.clip(np.linalg.solve(normal, -slopes.T @ found), -_LARGEST_CHANGE, _LARGEST_CHANGE)
        tried = residuals(logs + change)
        if tried @ tried < found @ found:
            logs, found, damping = logs + change, tried, max(damping / 3, 1e-6)
        else:
            damping *= 4
    return constants(logs)
