"""Predicts how long every scan takes on a described cluster, and chooses the fastest: ``scan="auto"``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule.ir import Direction, Fold, Payload
from megatron_lightseq.schedule.network import NETWORKS, Network
from megatron_lightseq.schedule.scan import Scan
from megatron_lightseq.schedule.scan_place import SCANS, build_scan
from megatron_lightseq.schedule.simulate import Moment, Simulation, play

FOLD_FLOPS_PER_S = 50e12
"""Of one rank: matrix products of head dims, far below a GPU's peak."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateShape:
    """Shape of a state and of a map, for counting bytes and operations."""

    batch: int = 1
    heads: int = 1
    key_dim: int = 128
    value_dim: int = 128
    transition: int | None = None
    """Numbers for each head that a map multiplies a state by: 1, ``key_dim``, or None for a matrix."""
    pieces: int | None = None
    """Maps of one chunk: those of its pieces, kept apart so that states are the same bits in every scan. None: a run of
    chunks has one map."""
    element_bytes: int = 4

    def bytes_of(self, payload: Payload, chunks: int = 1) -> int:
        """Bytes of an item on the wire; a state is one, whatever it is behind."""
        state = self.key_dim * self.value_dim
        numbers = state
        if payload is Payload.MAP:
            size = self.key_dim**2 if self.transition is None else self.transition
            numbers = (state + size) * (1 if self.pieces is None else self.pieces * chunks)
        return numbers * self.batch * self.heads * self.element_bytes

    def fold_flops(self, fold: Fold) -> int:
        """Operations of one fold. Maps whose pieces are kept apart are not folded, but put side by side."""
        if fold.earlier.payload is Payload.MAP and self.pieces is not None:
            return 0
        columns = self.value_dim
        if fold.earlier.payload is Payload.MAP and self.transition is None:
            columns += self.key_dim
        rows = self.key_dim if self.transition is None else 1
        times = 1 if self.pieces is None else self.pieces * fold.later.chunks
        return 2 * self.batch * self.heads * self.key_dim * rows * columns * times


def simulate_scan(scan: Scan, shape: StateShape, network: Network | None = None) -> Simulation:
    """Predict the exchange of one layer: when each rank has its state, and how many bytes it transfers.

    Args:
        scan: what to play.
        shape: of the states.
        network: what they travel over; None if that is free.
    """
    return play(_moments(scan, shape), scan.layout.cp_size, network)


def _moments(scan: Scan, shape: StateShape) -> Iterator[Moment]:
    for step in scan.steps:
        work = (sum(map(shape.fold_flops, folds)) / FOLD_FLOPS_PER_S for folds in step.folds)
        messages = ((m.src, m.dst, shape.bytes_of(m.payload, m.chunks)) for m in step.moves)
        yield Moment(tuple(work), tuple(messages))


def rank_scans(
    layout: SequenceLayout, mask: Mask, seq_length: int, shape: StateShape, network: Network | None = None
) -> list[tuple[float, str]]:
    """Every scan with the seconds of both directions, the fastest first, and of equals the one of fewer bytes."""
    found = []
    network = NETWORKS["nvlink+100gbps"] if network is None else network
    for name in SCANS:
        played = [
            simulate_scan(
                build_scan(
                    name, layout, mask=mask, direction=direction, seq_length=seq_length, network=network
                ),
                shape,
                network,
            )
            for direction in Direction
        ]
        sent = sum(sum(direction.bytes_sent) for direction in played)
        found.append((sum(direction.makespan_s for direction in played), sent, name))
    return [(seconds, name) for seconds, _, name in sorted(found)]
