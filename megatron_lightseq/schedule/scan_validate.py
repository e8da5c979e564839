"""Finds the first reason why a scan would leave a rank without the state that it needs.

Replays the scan with sets. It knows nothing about how the scan was made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_lightseq.schedule.ir import Direction, Fold, Item, Move, Payload, ScanStep, item_of
from megatron_lightseq.schedule.validate import Fault


def states_needed(
    borders: Sequence[int], cp_size: int, shard_length: int, direction: Direction
) -> dict[int, Item]:
    """By rank: the state that its tokens need from other ranks. A rank that begins with a document needs none.

    Args:
        borders: of the documents, ``(0, ..., seq_length)``.
        cp_size: ranks, each with one chunk of adjacent tokens.
        shard_length: tokens of each.
        direction: forward: the state before a rank's first token. Backward: its gradient behind the last token.
    """
    needed = {}
    for rank in range(cp_size):
        if direction is Direction.FORWARD:
            at = rank * shard_length
            start = max((border for border in borders if border <= at), default=0)
            if start < at:
                first = start // shard_length
                needed[rank] = Item(Payload.STATE, first, rank - first)
        else:
            at = (rank + 1) * shard_length
            stop = min((border for border in borders if border >= at), default=at)
            if stop > at:
                needed[rank] = Item(Payload.STATE, rank + 1, -(-stop // shard_length) - rank - 1)
    return needed


@dataclass(slots=True)
class _Rank:
    """What one rank knows, and what of it has been of use."""

    held: set[Item]
    arrived: set[Item] = field(default_factory=set)
    folded: set[Item] = field(default_factory=set)
    used: set[Item] = field(default_factory=set)


def find_scan_fault(
    steps: Sequence[ScanStep], *, direction: Direction, cp_size: int, needed: Mapping[int, Item]
) -> Fault | None:
    """The first fault, or None.

    Args:
        steps: of the scan.
        direction: in which states go.
        cp_size: ranks, each with one chunk.
        needed: by rank, as of :func:`states_needed`.
    """
    ranks = [_Rank({Item(Payload.MAP, r), Item(Payload.STATE, r)}) for r in range(cp_size)]
    for t, step in enumerate(steps):
        if len(step.folds) != cp_size:
            return Fault(t, f"folds of {len(step.folds)} ranks instead of {cp_size}")
        before = [set(rank.held) for rank in ranks]
        for number, (rank, folds) in enumerate(zip(ranks, step.folds, strict=True)):
            reason = _fold_all(number, rank, folds, direction)
            if reason is not None:
                return Fault(t, reason)
        arriving: list[tuple[int, Item]] = []
        for move in step.moves:
            reason = _send(move, before, ranks, arriving)
            if reason is not None:
                return Fault(t, reason)
        for number, item in arriving:
            ranks[number].held.add(item)
            ranks[number].arrived.add(item)
    return _missing_or_unused(len(steps) - 1, ranks, needed)


def _fold_all(number: int, rank: _Rank, folds: Sequence[Fold], direction: Direction) -> str | None:
    for fold in folds:
        for item in fold:
            if item not in rank.held:
                return f"rank {number} folds {fold} but does not have {item}"
            rank.used.add(item)
        first, then = fold if direction is Direction.FORWARD else fold[::-1]
        if first.stop != then.chunk:
            return f"rank {number} folds {fold}, which are not adjacent in the {direction} direction"
        if fold.later.payload is not Payload.MAP:
            return f"rank {number} folds {fold}, but only a map says what becomes of an earlier state"
        if fold.result in rank.held:
            return f"rank {number} folds {fold} but has {fold.result} already"
        rank.held.add(fold.result)
        rank.folded.add(fold.result)
    return None


def _send(
    move: Move, before: Sequence[set[Item]], ranks: Sequence[_Rank], arriving: list[tuple[int, Item]]
) -> str | None:
    item = item_of(move)
    if not (0 <= move.src < len(ranks) and 0 <= move.dst < len(ranks)) or move.src == move.dst:
        return f"{move} does not go from one rank to another"
    if item not in before[move.src]:
        return f"{move}: rank {move.src} does not have {item} when the step begins"
    if item in ranks[move.dst].held or (move.dst, item) in arriving:
        return f"{move}: rank {move.dst} has {item} already"
    ranks[move.src].used.add(item)
    arriving.append((move.dst, item))
    return None


def _missing_or_unused(last: int, ranks: Sequence[_Rank], needed: Mapping[int, Item]) -> Fault | None:
    for number, item in needed.items():
        if item not in ranks[number].held:
            return Fault(last, f"rank {number} never gets {item}, the state that its tokens need")
        ranks[number].used.add(item)
    for number, rank in enumerate(ranks):
        idle = sorted((rank.arrived | rank.folded) - rank.used)
        if idle:
            return Fault(last, f"{idle[0]} is brought to rank {number}, which never uses it")
    return None
