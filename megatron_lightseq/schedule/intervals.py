"""Sets of chunks as sorted intervals, whose cost does not depend on the number of chunks."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator


class Intervals:
    """A set of integers, kept as disjoint half-open intervals that do not touch."""

    __slots__ = ("_starts", "_stops")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(zip(self._starts, self._stops, strict=True))

    def __bool__(self) -> bool:
        return bool(self._starts)

    def covers(self, start: int, stop: int) -> bool:
        """Whether all of ``[start, stop)`` is in the set."""
        i = bisect_right(self._starts, start) - 1
        return i >= 0 and self._stops[i] >= stop

    def meets(self, start: int, stop: int) -> bool:
        """Whether any part of ``[start, stop)`` is in the set."""
        i = bisect_right(self._stops, start)
        return i < len(self._starts) and self._starts[i] < stop

    def missing(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The parts of ``[start, stop)`` that are not in the set, in order."""
        gaps = []
        i = bisect_right(self._stops, start)
        while i < len(self._starts) and self._starts[i] < stop:
            if start < self._starts[i]:
                gaps.append((start, self._starts[i]))
            start = self._stops[i]
            i += 1
        if start < stop:
            gaps.append((start, stop))
        return gaps

    def add(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Add ``[start, stop)`` to the set, and return the parts of it that are new."""
        new = self.missing(start, stop)
        first, last = bisect_left(self._stops, start), bisect_right(self._starts, stop)
        if first < last:
            start, stop = min(start, self._starts[first]), max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]
        return new

    def remove(self, start: int, stop: int) -> None:
        """Remove ``[start, stop)`` from the set."""
        kept = [(a, b) for x, y in self for a, b in ((x, min(y, start)), (max(x, stop), y)) if a < b]
        self._starts = [a for a, _ in kept]
        self._stops = [b for _, b in kept]
