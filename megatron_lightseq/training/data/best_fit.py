"""Best-fit packing: documents into sequences of one length, without cutting any."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Documents by sequence: the longest first, each into the fullest sequence that still has room for it.

    With the longest first, best-fit needs at most 11/9 of the fewest sequences possible, and a constant (Johnson 1973).
    Documents of one length stay in their order, so the result depends on the lengths only.

    Args:
        lengths: of the documents, each at most ``capacity``.
        capacity: tokens of a sequence.

    Returns:
        The numbers of the documents in each sequence; sequences in the order in which they were begun.
    """
    assert max(lengths, default=0) <= capacity, "longer documents are refused before"
    packs: list[list[int]] = []
    open_with: dict[int, list[int]] = {}
    """Sequences by the room that is left in them, the newest last."""
    rooms: list[int] = []
    """The keys of open_with, ascending."""
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[number]
        at = bisect_left(rooms, length)
        if at == len(rooms):
            pack, room = len(packs), capacity
            packs.append([])
        else:
            room = rooms[at]
            pack = open_with[room].pop()
            if not open_with[room]:
                del open_with[room], rooms[at]
        packs[pack].append(number)
        left = room - length
        if left not in open_with:
            open_with[left] = []
            insort(rooms, left)
        open_with[left].append(pack)
    return packs
