"""An assignment as rectangles: every pair of tokens that the mask allows is in exactly one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import sub

from megatron_lightseq.schedule.balance.rows import Row
from megatron_lightseq.schedule.balance.solve import Assignment, Grant


@dataclass(frozen=True, slots=True)
class Block:
    """Queries ``[q_start, q_stop)`` of one piece against keys ``[k_start, k_stop)`` of one piece, in tokens."""

    borders: tuple[int, ...]
    """Where its rows begin, and where the last one ends; the first and the last row may be cut."""
    areas: tuple[int, ...]
    """Allowed pairs of each row, nearly."""
    k_start: int
    k_stop: int

    @property
    def q_start(self) -> int:
        """The first query."""
        return self.borders[0]

    @property
    def q_stop(self) -> int:
        """Behind the last query."""
        return self.borders[-1]

    @property
    def area(self) -> int:
        """Allowed pairs, nearly."""
        return sum(self.areas)

    def cut(self, area: float, quantum: int) -> tuple[Block | None, Block | None]:
        """The block cut between two queries, as near to ``area`` pairs as multiples of ``quantum`` queries allow."""
        filled = 0
        for i, pairs in enumerate(self.areas):
            if filled + pairs > area:
                return self._cut_in_row(i, (area - filled) / pairs, quantum)
            filled += pairs
        return self, None

    def _cut_in_row(self, i: int, share: float, quantum: int) -> tuple[Block | None, Block | None]:
        start, stop = self.borders[i], self.borders[i + 1]
        at = start + int((stop - start) * share / quantum + 0.5) * quantum
        if at >= stop:
            at, head, tail = stop, self.areas[: i + 1], self.areas[i + 1 :]
        elif at == start:
            head, tail = self.areas[:i], self.areas[i:]
        else:
            part = self.areas[i] * (at - start) // (stop - start)
            head, tail = (*self.areas[:i], part), (self.areas[i] - part, *self.areas[i + 1 :])
        before = (
            Block((*(b for b in self.borders[:-1] if b < at), at), head, self.k_start, self.k_stop)
            if head
            else None
        )
        behind = (
            Block((at, *(b for b in self.borders[1:] if b > at)), tail, self.k_start, self.k_stop)
            if tail
            else None
        )
        return before, behind


def blocks_of(assignment: Assignment) -> list[list[Block]]:
    """The blocks that each rank computes."""
    length, num_ranks = assignment.piece_length, len(assignment.loads)
    found: list[list[Block]] = [[] for _ in range(num_ranks)]
    for piece in range(assignment.num_pieces):
        rows = assignment.rows[piece * assignment.grain : (piece + 1) * assignment.grain]
        for run in _kept(rows):
            start, stop = min(row.first_key for row in run), max(row.last_key for row in run)
            found[piece % num_ranks] += _by_key_piece(run, start, stop, length, assignment.quantum)
    for helper, grants in _rectangles(assignment):
        rows = assignment.rows[grants[0].row : grants[-1].row + 1]
        start, stop = min(grant.start for grant in grants), max(grant.stop for grant in grants)
        found[helper] += _by_key_piece(rows, start, stop, length, assignment.quantum)
    return found


def _kept(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """What a piece's own rank computes: runs of rows whose keys are taken up to the same position."""
    run: list[Row] = []
    for row in rows:
        if run and (row.given or row.taken != run[0].taken):
            yield run
            run = []
        if not row.given:
            run.append(row)
    if run:
        yield run


def _rectangles(assignment: Assignment) -> Iterator[tuple[int, list[Grant]]]:
    """Grants of consecutive rows of one piece to one helper that together are a rectangle."""
    group: list[Grant] = []
    for grant in sorted(assignment.grants, key=lambda g: (g.helper, g.row, g.start)):
        if group and not _continues(group[-1], grant, assignment):
            yield group[0].helper, group
            group = []
        group.append(grant)
    if group:
        yield group[0].helper, group


def _continues(last: Grant, grant: Grant, assignment: Assignment) -> bool:
    if (grant.helper, grant.row) != (last.helper, last.row + 1) or grant.row % assignment.grain == 0:
        return False
    if (grant.start, grant.stop) == (last.start, last.stop):
        return True
    rows = [assignment.rows[g.row] for g in (last, grant)]
    to_the_end = all(g.stop == row.last_key for g, row in zip((last, grant), rows, strict=True))
    from_the_start = all(g.start == row.edges[0] for g, row in zip((last, grant), rows, strict=True))
    return to_the_end and (from_the_start or grant.start == last.start)


def _by_key_piece(rows: Sequence[Row], start: int, stop: int, length: int, quantum: int) -> Iterator[Block]:
    """The rows against the keys ``[start, stop)``, cut where the keys' owner changes and clipped to what rows see."""
    start, stop = start // quantum * quantum, -(-stop // quantum) * quantum
    counted = [row.before(start) for row in rows]
    for piece in range(start // length, -(-stop // length)):
        a, b = max(start, piece * length), min(stop, (piece + 1) * length)
        count = [row.before(b) for row in rows]
        first = 0
        while first < len(rows):
            last = first
            while last < len(rows) and count[last] > counted[last]:
                last += 1
            if last > first:
                areas = tuple(map(sub, count[first:last], counted[first:last]))
                yield _block(rows[first:last], areas, a, b, quantum)
            first = last + 1
        counted = count


def _block(rows: Sequence[Row], areas: tuple[int, ...], start: int, stop: int, quantum: int) -> Block:
    first, last = min([row.edges[0] for row in rows]), max([row.edges[-1] for row in rows])
    a, b = max(start, first // quantum * quantum), min(stop, -(-last // quantum) * quantum)
    return Block((rows[0].start, *[row.stop for row in rows]), areas, a, b)
