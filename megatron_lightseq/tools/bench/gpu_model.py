"""What the Hopper kernels should reach, from arithmetic alone: a prediction to hold the first measurement against.

A kernel repeats one inner tile. This counts the cycles that a tile takes on each unit of a multiprocessor: the tensor
cores, shared memory (operands of wgmma, TMA writes, stores of dS and dQ) and exponentials. Products overlap with the
operands that they read; exponentials overlap with products only in part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

TENSOR_FLOPS = 4096
"""Per cycle and multiprocessor, 16-bit inputs and fp32 sums (data sheet of H100 and H200)."""
SHARED_BYTES = 128
"""Per cycle and multiprocessor."""
EXPONENTIALS = 16
"""Per cycle and multiprocessor."""
MATMUL_TFLOPS = 790.0
"""Rate of a plain matrix product on an H200 under load; published figures are 750 to 800."""
SLOW, FAST = 0, 1
NOT_OVERLAPPED = {"forward": (0.9, 0.4), "backward": (2.5, 1.0)}
"""How many times the cycles of the exponentials add to those of the busiest unit, for the slow and the fast end of the
range. Chosen so that FlashAttention-3's published figures (H100, long sequences: forward 648 at head dim 128 and 497 at
64, backward 561 and 474 TFLOP/s) are within the range, close to its fast end at 128."""
ROW_CYCLES = 150
"""Of shared memory per tile of the backward pass: log-sum-exp and delta of its queries, read by every warp."""
PANEL = 64
"""Columns of a tile in shared memory are copied in multiples of this."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TileCost:
    """Cycles of one multiprocessor for the inner tile of one kernel."""

    direction: str
    head_dim: int
    value_dim: int
    queries: int
    keys: int
    tensor: float
    shared: float
    exponentials: float

    @property
    def busiest(self) -> float:
        """Cycles of the unit that bounds the kernel if everything overlaps."""
        return max(self.tensor, self.shared, self.exponentials)

    @property
    def bound_by(self) -> str:
        """The name of that unit; of equal ones the first."""
        units = {
            "tensor cores": self.tensor,
            "shared memory": self.shared,
            "exponentials": self.exponentials,
        }
        return max(units, key=lambda name: units[name])

    @property
    def ceiling(self) -> float:
        """Share of the tensor cores' rate that is left if everything overlaps."""
        return self.tensor / self.busiest

    def tflops(self, end: int) -> float:
        """The predicted rate of long sequences without a mask; ``end`` is SLOW or FAST."""
        cycles = self.busiest + NOT_OVERLAPPED[self.direction][end] * self.exponentials
        return MATMUL_TFLOPS * self.tensor / cycles


def padded(columns: int) -> int:
    """Columns of a tile in shared memory."""
    return -(-columns // PANEL) * PANEL


def forward_cost(head_dim: int, value_dim: int, consumers: int, keys: int) -> TileCost:
    """A tile of keys of csrc/cuda/forward_sm90.h, for ``consumers`` warpgroups with 64 queries each."""
    queries = 64 * consumers
    operands = consumers * 2 * ((64 + keys) * head_dim + keys * value_dim)  # Q and K; V, as P is in registers
    copies = 2 * keys * (padded(head_dim) + padded(value_dim))
    return TileCost(
        direction="forward",
        head_dim=head_dim,
        value_dim=value_dim,
        queries=queries,
        keys=keys,
        tensor=2 * queries * keys * (head_dim + value_dim) / TENSOR_FLOPS,
        shared=(operands + copies) / SHARED_BYTES,
        exponentials=queries * keys / EXPONENTIALS,
    )


def backward_cost(head_dim: int) -> TileCost:
    """One tile of queries of the backward kernel that computes all gradients (csrc/cuda/backward_sm90.h)."""
    queries, keys, consumers = 64, 128, 2
    holds_keys = head_dim == PANEL
    columns = padded(head_dim)  # of dQ, whose padding is computed too
    scores = 2 * consumers * 2 * (queries + (0 if holds_keys else 64)) * head_dim  # S and dP
    sums = 2 * consumers * 2 * queries * head_dim  # dV and dK
    query_sums = consumers * 2 * (queries * keys + keys * columns // consumers)
    moved = (
        2 * 2 * queries * columns + 2 * queries * keys + 2 * 4 * queries * columns
    )  # Q and dO; dS; dQ twice
    return TileCost(
        direction="backward",
        head_dim=head_dim,
        value_dim=head_dim,
        queries=queries,
        keys=keys,
        tensor=2 * queries * keys * 5 * head_dim / TENSOR_FLOPS,
        shared=(scores + sums + query_sums + moved) / SHARED_BYTES + ROW_CYCLES,
        exponentials=queries * keys / EXPONENTIALS,
    )


FORWARD = {
    (64, 64): (3, 128),
    (80, 80): (2, 128),
    (96, 96): (2, 128),
    (128, 128): (2, 128),
    (192, 128): (2, 128),
    (256, 256): (2, 80),
}
"""(D, Dv) -> consumer warpgroups and keys per tile, as in csrc/cuda/sm90_instances.h."""
BACKWARD = (64, 80, 96, 128)
"""Head dims of csrc/cuda/instances.h that have Hopper backward kernels; the others run kernels for 8.0."""


def costs() -> Iterator[TileCost]:
    """Of every Hopper kernel."""
    for dims, tile in FORWARD.items():
        yield forward_cost(*dims, *tile)
    for head_dim in BACKWARD:
        yield backward_cost(head_dim)


def predicted_tflops(direction: str, head_dim: int) -> tuple[float, float] | None:
    """The slow and the fast end of the prediction for D = Dv; None if there is no Hopper kernel for it."""
    for cost in costs():
        if (cost.direction, cost.head_dim, cost.value_dim) == (direction, head_dim, head_dim):
            return cost.tflops(SLOW), cost.tflops(FAST)
    return None


def table() -> str:
    """A Markdown table with a line per kernel."""
    lines = [
        "| kernel | tile | tensor cores | shared memory | exponentials | bound by | ceiling | predicted TFLOP/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cost in costs():
        dims = str(cost.head_dim) if cost.head_dim == cost.value_dim else f"{cost.head_dim}:{cost.value_dim}"
        cells = (
            f"{cost.direction} {dims}",
            f"{cost.queries} x {cost.keys}",
            *(f"{cycles:.0f}" for cycles in (cost.tensor, cost.shared, cost.exponentials)),
            cost.bound_by,
            f"{cost.ceiling:.0%}",
            f"{cost.tflops(SLOW):.0f} to {cost.tflops(FAST):.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
