"""How states reach the ranks that need them: each way is a pure function from what is needed to steps.

Every function places the forward direction, given for each rank that needs a state the chunk where it starts. The
backward direction is the forward one of the mirrored sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule.ir import Direction, Fold, Item, Move, Payload, ScanStep, item_of
from megatron_lightseq.schedule.network import Network
from megatron_lightseq.schedule.scan import Scan
from megatron_lightseq.schedule.scan_validate import states_needed

Starts = Mapping[int, int]
"""By rank that needs a state: the first chunk of the run that the state is behind."""
RANKS_PER_NODE = 8
"""Of a network that does not say."""


class _Steps:
    """Collects folds and moves by step."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._folds: dict[tuple[int, int], list[Fold]] = {}
        self._moves: dict[int, list[Move]] = {}

    def fold(self, t: int, rank: int, earlier: Item, later: Item) -> Item:
        """A fold at step t; its result."""
        fold = Fold(earlier, later)
        self._folds.setdefault((t, rank), []).append(fold)
        return fold.result

    def move(self, t: int, item: Item, src: int, dst: int) -> None:
        """A move at step t."""
        self._moves.setdefault(t, []).append(Move(item.payload, item.chunk, src, dst, item.chunks))

    def steps(self) -> tuple[ScanStep, ...]:
        """All steps up to the last one in which anything happens."""
        last = max([*(t for t, _ in self._folds), *self._moves], default=-1)
        return tuple(
            ScanStep(
                tuple(tuple(self._folds.get((t, rank), ())) for rank in range(self._size)),
                tuple(sorted(self._moves.get(t, ()))),
            )
            for t in range(last + 1)
        )


def _known(start: int, first: int, stop: int) -> Item:
    """What is enough to know of ``[first, stop)`` for a state that starts at ``start``."""
    return Item(Payload.STATE if first == start else Payload.MAP, first, stop - first)


def place_ring(size: int, starts: Starts, node: int) -> tuple[ScanStep, ...]:
    """The state goes from rank to rank, and each folds its own map on it: one state a hop, one hop after another."""
    made, t = _Steps(size), 0
    for rank in range(1, size):
        if rank not in starts:
            t = 0  # a document begins here, and its states do not wait for those before
            continue
        start, source = starts[rank], rank - 1
        state = Item(Payload.STATE, source)
        if start < source:
            state = made.fold(t, source, _known(start, start, source), Item(Payload.MAP, source))
            t += 1
        made.move(t, state, source, rank)
        t += 1
    return made.steps()


def place_all_gather(size: int, starts: Starts, node: int) -> tuple[ScanStep, ...]:
    """Every rank receives the maps of all before it, at once, and folds them in order (LASP-2, arXiv 2502.07563)."""
    made = _Steps(size)
    for rank, start in starts.items():
        for chunk in range(start, rank):
            made.move(0, _known(start, chunk, chunk + 1), chunk, rank)
        state = Item(Payload.STATE, start)
        for chunk in range(start + 1, rank):
            state = made.fold(1, rank, state, Item(Payload.MAP, chunk))
    return made.steps()


def place_doubling(size: int, starts: Starts, node: int) -> tuple[ScanStep, ...]:
    """Runs double from round to round (Hillis and Steele, 1986): log2(P) rounds, one message for each rank in each."""
    made = _Steps(size)
    _double(made, starts, lambda rank: starts[rank])
    return made.steps()


def _double(made: _Steps, starts: Starts, begin: Callable[[int], int]) -> tuple[dict[int, Item], int]:
    """Doubling: each rank gets to know the run from its ``begin`` up to itself.

    Returns:
        What each rank knows in the end, unless it begins itself; and the step in which all of it can be used.
    """
    known = {rank: _known(starts[rank], rank - 1, rank) for rank in starts if begin(rank) < rank}
    for rank, item in known.items():
        made.move(0, item, rank - 1, rank)
    t = 1
    while any(item.chunk > begin(rank) for rank, item in known.items()):
        grown = dict(known)
        for rank, item in known.items():
            source = item.chunk  # the rank that knows the run up to this chunk
            if source <= begin(rank):
                continue
            first = max(known[source].chunk, begin(rank))
            more = _known(starts[rank], first, source)
            made.move(t, more, source, rank)
            grown[rank] = made.fold(t + 1, rank, more, Item(Payload.MAP, item.chunk, item.chunks))
        known, t = grown, t + 2
    return known, t


def place_two_level(size: int, starts: Starts, node: int) -> tuple[ScanStep, ...]:
    """Doubling within nodes, and one state from node to node, which the last of its ranks hands to the others."""
    made = _Steps(size)
    inside, done = _double(made, starts, lambda rank: max(starts[rank], rank // node * node))
    entering, arrived = Item(Payload.STATE, 0), 0
    for first in range(node, size, node):
        ranks = [rank for rank in range(first, min(first + node, size)) if starts.get(rank, first) < first]
        if not ranks:
            continue
        source, start = first - 1, starts[first]
        state, at = Item(Payload.STATE, source), 0
        if start < source:
            total, at = Item(Payload.MAP, source), done
            if source in inside:  # a state, where the document begins in this node, or else a map
                total = made.fold(done, source, inside[source], total)
            if start < source // node * node:
                at = max(done, arrived)
                total = made.fold(at, source, entering, total)
            state, at = total, at + 1
        made.move(at, state, source, ranks[-1])
        entering, arrived = state, at + 1
        for rank in ranks:
            if rank != ranks[-1]:
                made.move(arrived, state, ranks[-1], rank)
            if rank != first:
                made.fold(max(done, arrived + 1), rank, state, inside[rank])
    return made.steps()


@dataclass(frozen=True, slots=True)
class ScanMethod:
    """A way for states to travel."""

    name: str
    summary: str
    """One line, without a full stop."""
    place: Callable[[int, Starts, int], tuple[ScanStep, ...]]
    """From (ranks, starts, ranks of a node) to the steps of the forward direction."""


SCANS = {
    method.name: method
    for method in (
        ScanMethod("ring", "one state from rank to rank: the fewest bytes", place_ring),
        ScanMethod("all_gather", "the maps of all ranks at once: the fewest steps", place_all_gather),
        ScanMethod("doubling", "maps of runs that double: log2(P) rounds", place_doubling),
        ScanMethod("two_level", "doubling within nodes, one state between them", place_two_level),
    )
}
"""Every scan by name."""


def build_scan(
    method: str,
    layout: SequenceLayout,
    *,
    mask: Mask | None = None,
    direction: str | Direction = Direction.FORWARD,
    seq_length: int | None = None,
    network: Network | None = None,
) -> Scan:
    """Place and validate a scan.

    Args:
        method: a name in :data:`SCANS`.
        layout: contiguous.
        mask: causal (the default) or causal documents.
        direction: forward, or backward for the gradients of states.
        seq_length: tokens over all ranks; default 1024 per rank, or where the documents end.
        network: says how many ranks a node has.

    Raises:
        LayoutError: the layout is not contiguous, or the sequence does not divide among the ranks.
        UnsupportedError: no scan has that name.
    """
    if method not in SCANS:
        raise UnsupportedError(
            explain(
                got=f"scan {method!r}",
                rule=f"the scans are {', '.join(SCANS)}",
                remedy="Choose one of them",
            )
        )
    mask, direction, size = Mask.causal() if mask is None else mask, Direction(direction), layout.cp_size
    seq_length = seq_length or mask.length or size * 1024
    layout.check_length(seq_length)
    packing = mask.packing(seq_length)
    borders = (0, seq_length) if packing is None else packing[0]
    needed = states_needed(borders, size, seq_length // size, direction)
    node = (None if network is None else network.ranks_per_node) or RANKS_PER_NODE
    if direction is Direction.FORWARD:
        steps = SCANS[method].place(size, {rank: item.chunk for rank, item in needed.items()}, node)
    else:
        mirrored = {size - 1 - rank: size - item.stop for rank, item in reversed(needed.items())}
        steps = tuple(_mirrored(step, size) for step in SCANS[method].place(size, mirrored, node))
    return Scan(method, direction, layout, mask, seq_length, steps)


def _mirrored(step: ScanStep, size: int) -> ScanStep:
    def turned(item: Item) -> Item:
        return Item(item.payload, size - item.stop, item.chunks)

    moves = []
    for move in step.moves:
        item = turned(item_of(move))
        moves.append(Move(item.payload, item.chunk, size - 1 - move.src, size - 1 - move.dst, item.chunks))
    folds = tuple(
        tuple(Fold(turned(fold.earlier), turned(fold.later)) for fold in of_rank)
        for of_rank in reversed(step.folds)
    )
    return ScanStep(folds, tuple(sorted(moves)))
