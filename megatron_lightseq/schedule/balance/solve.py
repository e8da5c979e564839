"""Who computes what: owners compute, and ranks with little work take rectangles of it over from ranks with much.

Ranks above the mean load are *donors*, ranks below it *helpers*. The helper that lacks most takes a rectangle (some
rows of one document x a prefix of their keys) from the donor where a pair of tokens costs least to move:

* ``query`` for every query token that travels to the helper and whose result travels back,
* ``key`` for every key token that the helper does not receive anyway,
* less ``key`` for every key token that the donor then need not receive; all of it ``far`` times as much between nodes.

The rectangle of a given area that is cheapest to move has ``sqrt(query x area / key)`` keys. With expensive keys
(multi-head attention) it is few rows of many keys, which is LightSeq's help; with cheap keys (few key/value heads) it
is many rows of few keys, which is the exchange of late rows for early ones that a zigzag layout makes.

`csrc/plan` holds the same algorithm in C++, operation by operation, for speed. This one is its test's oracle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import sqrt

from megatron_lightseq.schedule.balance.rows import Row, quantum_of

DONORS_LOOKED_AT = 12
"""Donors that a helper weighs: those with the most surplus, and all of its own node. Bounds the time for many ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """What it costs to move a token; only ratios matter."""

    query: float
    """Of a query token: its inputs there and its results back."""
    key: float
    """Of a key token: keys and values there and, in the backward pass, their gradients back."""
    far: float = 1.0
    """How many times as much a transfer between nodes costs."""


@dataclass(frozen=True, slots=True)
class Grant:
    """``helper`` computes the queries of the row number ``row`` against the keys in ``[start, stop)``."""

    helper: int
    row: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Who computes what: rows say what is left to their owners, grants what helpers compute."""

    rows: Sequence[Row]
    grants: Sequence[Grant]
    loads: Sequence[int]
    """Pairs that each rank computes."""
    grain: int
    """Rows per piece."""
    quantum: int
    """Tokens that all cuts are multiples of."""

    @property
    def piece_length(self) -> int:
        """Tokens per piece."""
        return self.rows[-1].stop * self.grain // len(self.rows)

    @property
    def num_pieces(self) -> int:
        """Pieces of all ranks; piece p is rank ``p % num_ranks``'s."""
        return len(self.rows) // self.grain


@dataclass(slots=True)
class _Offer:
    """A rectangle that a donor could give away: rows by number, and their keys before ``stop`` (None: all of them)."""

    cost: float
    """Per pair."""
    rows: Sequence[int]
    stop: int | None


@dataclass(slots=True)
class _Solver:
    rows: Sequence[Row]
    grain: int
    prices: Prices
    nodes: Sequence[int]
    level: float
    """The load that helpers are filled up to and donors come down to."""
    slack: float
    """How far from ``level`` is near enough."""
    loads: list[int]
    quantum: int
    grants: list[Grant] = field(default_factory=list)
    present: list[list[tuple[int, int]]] = field(default_factory=list)
    """Ranges of keys that each rank has or will receive."""

    def __post_init__(self) -> None:
        self.present = [[] for _ in self.loads]
        for first in range(0, len(self.rows), self.grain):
            rows = self.rows[first : first + self.grain]
            begin = min(rows[0].start, min(row.edges[0] for row in rows))
            self.present[first // self.grain % len(self.loads)].append((begin, rows[-1].stop))

    def _numbers_of(self, rank: int) -> Iterator[int]:
        """The numbers of a rank's rows, piece by piece."""
        for first in range(rank * self.grain, len(self.rows), len(self.loads) * self.grain):
            yield from range(first, first + self.grain)

    def run(self) -> None:
        surplus = {
            p: load - self.level for p, load in enumerate(self.loads) if load > self.level + self.slack
        }
        helpers = [p for p, load in enumerate(self.loads) if load < self.level]
        for helper in sorted(helpers, key=lambda p: self.loads[p]):
            while surplus and self.level - self.loads[helper] > self.slack:
                donor, moved = self._serve(helper, surplus)
                if not moved:
                    break
                self.loads[helper] += moved
                self.loads[donor] -= moved
                surplus[donor] -= moved
                if surplus[donor] <= self.slack:
                    del surplus[donor]

    def _serve(self, helper: int, surplus: dict[int, float]) -> tuple[int, int]:
        """Move one rectangle to ``helper``; its donor and its pairs, 0 if none can be moved."""
        lacking = self.level - self.loads[helper]
        donors = sorted(surplus, key=lambda p: (-surplus[p], p))
        near = [p for p in donors[DONORS_LOOKED_AT:] if self.nodes[p] == self.nodes[helper]]
        offers = []
        for donor in donors[:DONORS_LOOKED_AT] + near:
            offer = self._best_offer(donor, helper, min(surplus[donor], lacking))
            if offer is not None:
                offers.append((offer.cost, donor, offer))
        for _, donor, offer in sorted(offers, key=lambda entry: entry[:2]):
            moved = self._move(helper, offer, min(surplus[donor], lacking))
            if moved:
                return donor, moved
        return helper, 0

    # --- offers -------------------------------------------------------------------------------------------

    def _best_offer(self, donor: int, helper: int, want: float) -> _Offer | None:
        factor = 1.0 if self.nodes[donor] == self.nodes[helper] else self.prices.far
        query, key = self.prices.query * factor, self.prices.key * factor
        documents, short = self._bundles(donor)
        best = self._short_rows(short, want, query, key) if short else None
        for rows in documents:
            for offer in self._of_document(rows, helper, want, query, key):
                if best is None or offer.cost < best.cost:
                    best = offer
        return best

    def _bundles(self, donor: int) -> tuple[list[list[int]], list[int]]:
        """The donor's rows that share keys with other rows, by document; and those of short documents."""
        documents: dict[tuple[int, int], list[int]] = {}
        short: list[int] = []
        for number in self._numbers_of(donor):
            row = self.rows[number]
            if row.given:
                continue
            if row.shared - row.edges[0] > row.stop - row.start:
                documents.setdefault((row.document, row.taken), []).append(number)
            elif row.left:
                short.append(number)
        return list(documents.values()), short

    def _short_rows(self, numbers: list[int], want: float, query: float, key: float) -> _Offer | None:
        """The largest rows that fit; they share no keys with others, so their keys travel with them."""
        most = want + self.slack / 2
        fitting = sorted((self.rows[n].left, n) for n in numbers if self.rows[n].left <= most)
        moved = tokens = count = 0
        for left, number in reversed(fitting):
            moved += left
            tokens += self.rows[number].stop - self.rows[number].start
            count += 1
            if moved >= want:
                break
        if not moved:
            return None
        chosen = [number for _, number in fitting[len(fitting) - count :]]
        useful = min(float(moved), want)
        return _Offer((query * tokens * (useful / moved) + key * tokens) / useful, chosen, None)

    def _of_document(
        self, numbers: list[int], helper: int, want: float, query: float, key: float
    ) -> list[_Offer]:
        """Whole rows of one document, the last ones first; and prefixes of the keys of its last rows."""
        rows = [self.rows[n] for n in numbers]
        begin, room = rows[0].first_key, rows[0].shared - rows[0].first_key
        offers = []
        if rows[-1].left <= want + self.slack / 2:
            offers.append(self._last_rows(numbers, helper, begin, want, query, key))
        if room < self.quantum:
            return offers
        density = sum(row.density for row in rows)
        ideal = sqrt(query * want / key) if key else float(room)
        there = room - self._missing(helper, begin, begin + room)
        wished = [max(width, want / density, self.quantum) for width in (there, ideal, room)]
        stops = [self._aligned(begin + min(room, width)) for width in wished]
        for i, stop in enumerate(stops):
            if stop > begin and stop not in stops[:i]:
                offers.append(self._key_prefix(numbers, helper, begin, stop, want, query, key))
        return offers

    def _last_rows(
        self, numbers: list[int], helper: int, begin: int, want: float, query: float, key: float
    ) -> _Offer:
        moved = tokens = count = 0
        for number in reversed(numbers):
            row = self.rows[number]
            moved += row.left
            tokens += row.stop - row.start
            count += 1
            if moved >= want:
                break
        useful = min(float(moved), want)
        keys = self._missing(helper, begin, self.rows[numbers[-1]].last_key)
        cost = (query * tokens * (useful / moved) + key * keys) / useful
        return _Offer(cost, numbers[len(numbers) - count :], None)

    def _key_prefix(
        self,
        numbers: list[int],
        helper: int,
        begin: int,
        stop: int,
        want: float,
        query: float,
        key: float,
    ) -> _Offer:
        moved = tokens = count = 0
        for number in reversed(numbers):
            row = self.rows[number]
            moved += row.density * (stop - begin)
            tokens += row.stop - row.start
            count += 1
            if moved >= want:
                break
        cost = query * tokens + key * self._missing(helper, begin, stop)
        if count == len(numbers):  # the donor need not receive these keys
            own = self.rows[numbers[0] // self.grain * self.grain].start
            cost -= key * max(0, min(stop, own) - begin)
        return _Offer(cost / min(float(moved), want), numbers[len(numbers) - count :], stop)

    def _missing(self, rank: int, start: int, stop: int) -> int:
        """About how many keys in ``[start, stop)`` a rank neither has nor will receive (ranges may overlap)."""
        gap = stop - start
        for a, b in self.present[rank]:
            low, high = a if a > start else start, b if b < stop else stop
            if high > low:
                gap -= high - low
        return gap if gap > 0 else 0

    # --- moving -------------------------------------------------------------------------------------------

    def _move(self, helper: int, offer: _Offer, want: float) -> int:
        """Give the rectangle to ``helper``, cut to what is wanted; its pairs."""
        moved = 0
        for number in reversed(offer.rows):
            row = self.rows[number]
            room = want - moved + self.slack / 2
            if room <= self.slack / 2:
                break
            if offer.stop is None and row.left <= room:
                moved += row.left
                self._grant(helper, number, row.first_key, row.last_key)
                row.given = True
            else:
                stop = row.shared if offer.stop is None else min(offer.stop, row.shared)
                moved += self._move_prefix(helper, number, stop, room)
        return moved

    def _move_prefix(self, helper: int, number: int, stop: int, room: float) -> int:
        row = self.rows[number]
        first = row.first_key
        if row.density and stop - first > room / row.density:
            stop = self._aligned(first + room / row.density)
        pairs = row.pairs(first, stop)
        if not pairs:
            return 0
        self._grant(helper, number, first, stop)
        row.taken = stop
        return pairs

    def _aligned(self, position: float) -> int:
        return int(position) // self.quantum * self.quantum

    def _grant(self, helper: int, number: int, start: int, stop: int) -> None:
        self.grants.append(Grant(helper, number, start, stop))
        self.present[helper].append((start, stop))


def solve(
    rows: Sequence[Row],
    *,
    grain: int,
    prices: Prices,
    nodes: Sequence[int],
    target: float = 1.0,
    tolerance: float = 0.02,
    quantum: int | None = None,
) -> Assignment:
    """Balance the work of ``rows`` over their owners.

    Args:
        rows: ``grain`` rows for every piece of the sequence, in order; consumed (what is given away is marked in them).
        grain: rows per piece.
        prices: what moving a token costs.
        nodes: the node of every rank. Rank r of R holds the pieces r, r + R, r + 2 R, ...: one of each sequence, where
            several follow one another.
        target: helpers are filled up to this many times the mean load. More than 1 leaves some imbalance where moving
            work costs more than it saves.
        tolerance: allowed distance of loads from the target, as a fraction of the mean load.
        quantum: tokens that all cuts are multiples of; default :func:`quantum_of`.
    """
    loads = [0] * len(nodes)
    for number, row in enumerate(rows):
        loads[number // grain % len(loads)] += row.left
    mean = sum(loads) / len(loads)
    quantum = quantum_of(rows[-1].stop * grain // len(rows)) if quantum is None else quantum
    solver = _Solver(rows, grain, prices, nodes, mean * target, mean * tolerance, loads, quantum)
    solver.run()
    return Assignment(rows=rows, grants=solver.grants, loads=solver.loads, grain=grain, quantum=quantum)
