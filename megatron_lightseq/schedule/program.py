"""One rank's part of a schedule, with chunks turned into ranges of tokens of tensors.

Chunks that are adjacent in storage and are used in the same way in the same step become one *span*: one message
instead of two, one kernel call over a rectangle instead of four over its quarters. What remains for the runtime is
a list of calls and transfers, without any arithmetic on ranks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from operator import attrgetter

from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule.ir import DATAFLOW, RESULTS, Dataflow, Direction, Move, Payload, Tile
from megatron_lightseq.schedule.joins import Joins
from megatron_lightseq.schedule.schedule import Schedule

OWN = None
"""The store of an operand in the rank's own shard."""


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Chunks ``[first, stop)`` of one owner, adjacent both in the sequence and in storage."""

    first: int
    stop: int


@dataclass(frozen=True, slots=True)
class Operand:
    """Tokens ``[start, stop)`` of a store: the rank's own shard, or the buffer of a span that is transferred."""

    store: Span | None
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Call:
    """One kernel call: a rectangle of tiles."""

    q: Operand
    """Where the queries are read from."""
    k: Operand
    """Where the keys and values are read from."""
    q_result: Operand
    """Where the query side's result (out and lse, or dq) accumulates."""
    k_result: Operand | None
    """Where the key side's result (dk and dv) accumulates; None in the forward pass."""
    q_positions: range
    """Global positions of the queries."""
    k_positions: range
    """Global positions of the keys."""
    area: int
    """Allowed (query, key) pairs."""
    fresh: bool = False
    """Nothing has been accumulated into the results yet: the call overwrites them, even if uninitialised."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """The transfer of one span, as seen by one of its two ranks."""

    payload: Payload
    span: Span
    peer: int
    """The other rank."""
    start: int
    """Where the span begins in ``store``, in tokens; for a received input, in its owner's shard."""
    length: int
    """Tokens in the span."""
    tag: int
    """Number of this transfer in its schedule: equal at both ends and unique."""
    store: Span | None = OWN
    """Where an input is sent from: the rank's own shard, or the buffer of a received span that is forwarded."""

    def __str__(self) -> str:
        chunks = f"{self.span.first}" + (
            f"-{self.span.stop - 1}" if self.span.stop - self.span.first > 1 else ""
        )
        return f"{self.payload} of chunk {chunks}"


@dataclass(frozen=True, slots=True)
class ProgramStep:
    """What one rank does in one step: kernel calls, and the transfers that run concurrently with them."""

    calls: tuple[Call, ...]
    sends: tuple[Transfer, ...]
    receives: tuple[Transfer, ...]
    last_uses: tuple[tuple[Payload, Span], ...]
    """Received inputs that no later step reads, so that their buffers can be released after this step."""


@dataclass(frozen=True, slots=True)
class Blank:
    """A region of a result to initialise (out = 0, lse = -inf, gradients = 0): no kernel call overwrites it."""

    payload: Payload
    part: Operand


@dataclass(frozen=True, slots=True)
class Program:
    """Everything that one rank does in one direction."""

    rank: int
    direction: Direction
    mask: Mask
    shard_length: int
    """Tokens in the rank's own shard, of all rows."""
    steps: tuple[ProgramStep, ...]
    blanks: tuple[Blank, ...] = ()
    """Regions to initialise before anything is accumulated into them or they are returned."""
    batch_rows: int = 1
    """Rows with separate masks, one after the other in the shard; no operand crosses from one to the next."""
    joins: Joins | None = None
    """How results are joined so that their bits do not depend on the number of ranks; None: in any order."""

    @property
    def row_length(self) -> int:
        """Tokens of one row in the rank's own shard."""
        return self.shard_length // self.batch_rows

    @property
    def merges(self) -> bool:
        """Whether any result is combined from several parts: of several calls, or of several ranks."""
        calls = [call for step in self.steps for call in step.calls]
        return any(not call.fresh for call in calls) or any(
            transfer.payload in RESULTS for step in self.steps for transfer in (*step.sends, *step.receives)
        )


class _Geometry:
    """Where every chunk is, in the sequence and in its owner's shard."""

    def __init__(self, layout: SequenceLayout, seq_length: int) -> None:
        self.owner = layout.owner
        self._layout = layout
        self._seq_length = seq_length
        self._piece_length = seq_length // (layout.num_chunks // layout.splits)
        self._piece_offset = {}
        for rank in range(layout.cp_size):
            for at, chunk in enumerate(layout.chunks_of(rank)[:: layout.splits]):
                self._piece_offset[chunk // layout.splits] = at * self._piece_length

    def offset(self, chunk: int) -> int:
        """Where a chunk begins in its owner's shard, in tokens."""
        piece, part = divmod(chunk, self._layout.splits)
        return self._piece_offset[piece] + part * self._piece_length // self._layout.splits

    def positions(self, chunk: int) -> range:
        """Global positions of a chunk's tokens."""
        return self._layout.chunk_positions(chunk, self._seq_length)

    def adjacent(self, chunk: int) -> bool:
        """Whether ``chunk`` directly follows ``chunk - 1``: of the same owner, in the sequence and in storage."""
        if chunk % self._layout.splits:
            return True
        if self._layout.row_of(chunk) != self._layout.row_of(chunk - 1):
            return False
        before, after = self.positions(chunk - 1), self.positions(chunk)
        return (
            self.owner[chunk - 1] == self.owner[chunk]
            and before.start + len(before) * before.step == after.start
            and self.offset(chunk - 1) + len(before) == self.offset(chunk)
        )

    def spans(self, parts: Iterable[tuple[int, int]]) -> list[Span]:
        """Half-open ranges of chunks, combined into as few spans as possible."""
        spans: list[Span] = []
        for first, stop in sorted(parts):
            if spans and spans[-1].stop == first and self.adjacent(first):
                spans[-1] = Span(spans[-1].first, stop)
            else:
                spans.append(Span(first, stop))
        return spans

    def length(self, span: Span) -> int:
        """Tokens in a span."""
        last = span.stop - 1
        return self.offset(last) + len(self.positions(last)) - self.offset(span.first)

    def joined_positions(self, span: Span) -> range:
        """Global positions of the tokens of a span."""
        first = self.positions(span.first)
        return range(first.start, first.start + self.length(span) * first.step, first.step)


@lru_cache(maxsize=8)
def _geometry_of(layout: SequenceLayout, seq_length: int) -> _Geometry:
    return _Geometry(layout, seq_length)


def compile_program(schedule: Schedule, rank: int) -> Program:
    """What ``rank`` does in ``schedule``.

    Deterministic: every rank compiles its own program, and both ranks of a transfer give it the same tag.
    """
    geometry = _geometry_of(schedule.layout, schedule.seq_length)
    transfers = [_coalesce(step.moves, geometry) for step in schedule.steps]
    stores = _Stores(geometry, rank, transfers)
    tag = 0
    steps = []
    for t, step in enumerate(schedule.steps):
        sends: list[Transfer] = []
        receives: list[Transfer] = []
        for payload, src, dst, span in transfers[t]:
            if rank in (src, dst):
                peer, ends = (dst, sends) if rank == src else (src, receives)
                start, length, store = geometry.offset(span.first), geometry.length(span), OWN
                if rank == src and payload not in RESULTS:
                    source = stores.operand(payload, span)
                    start, store = source.start, source.store
                ends.append(Transfer(payload, span, peer, start, length, tag, store))
            tag += 1
        calls = _calls(step.tiles[rank], schedule, geometry, stores)
        steps.append(ProgramStep(tuple(calls), tuple(sends), tuple(receives), ()))
    shard_length = schedule.seq_length // schedule.layout.cp_size
    batch_rows = schedule.layout.batch_rows
    steps, blanks = _mark_fresh(steps, DATAFLOW[schedule.direction], shard_length, batch_rows)
    return Program(
        rank=rank,
        direction=schedule.direction,
        mask=schedule.mask,
        shard_length=shard_length,
        steps=_mark_last_uses(steps, schedule.direction),
        blanks=blanks,
        batch_rows=batch_rows,
    )


_Message = tuple[Payload, int, int, Span]  # payload, source, destination, chunks


def _coalesce(moves: tuple[Move, ...], geometry: _Geometry) -> list[_Message]:
    """The moves of one step, with those of adjacent chunks combined, in an order that is the same on all ranks."""

    def ends(move: Move) -> tuple[Payload, int, int]:
        return move.payload, move.src, move.dst

    messages: list[_Message] = []
    for key, group in groupby(sorted(moves, key=ends), key=ends):
        parts = [(move.chunk, move.chunk + move.chunks) for move in group]
        payload, src, _ = key
        if payload not in RESULTS and geometry.owner[parts[0][0]] != src:
            # Forwarded parts may be in different buffers, so they are not combined.
            spans = [Span(*part) for part in parts]
        else:
            spans = geometry.spans(parts)
        messages += [(*key, span) for span in spans]
    return messages


class _Stores:
    """Finds, for one rank, the store in which a chunk is read or accumulated."""

    def __init__(self, geometry: _Geometry, rank: int, transfers: list[list[_Message]]) -> None:
        self._geometry = geometry
        self._rank = rank
        self._spans: dict[Payload, list[Span]] = {payload: [] for payload in Payload}
        for payload, src, dst, span in (message for step in transfers for message in step):
            if rank == (src if payload in RESULTS else dst):
                self._spans[payload].append(span)
        for spans in self._spans.values():
            spans.sort()

    def store(self, payload: Payload, chunk: int) -> Span | None:
        """The store of one chunk of a payload."""
        if self._geometry.owner[chunk] == self._rank:
            return OWN
        spans = self._spans[payload]
        return spans[bisect_right(spans, chunk, key=attrgetter("first")) - 1]

    def parts(self, payloads: Iterable[Payload | None], chunks: range) -> Iterator[Span]:
        """The chunks, cut where a store of one of the payloads ends."""
        start = chunks.start
        while start < chunks.stop:
            stores = (self.store(payload, start) for payload in payloads if payload)
            stop = min((store.stop for store in stores if store is not OWN), default=chunks.stop)
            stop = min(stop, chunks.stop)
            yield Span(start, stop)
            start = stop

    def operand(self, payload: Payload, chunks: Span) -> Operand:
        """The tokens of adjacent chunks in their store."""
        store = self.store(payload, chunks.first)
        start = self._geometry.offset(chunks.first) - (self._geometry.offset(store.first) if store else 0)
        return Operand(store, start, start + self._geometry.length(chunks))

    def joined(self, payloads: Iterable[Payload | None], chunk: int) -> bool:
        """Whether ``chunk`` directly follows ``chunk - 1`` in the store of every payload."""
        return self._geometry.adjacent(chunk) and all(
            self.store(payload, chunk) == self.store(payload, chunk - 1) for payload in payloads if payload
        )


def _calls(
    tiles: tuple[Tile, ...], schedule: Schedule, geometry: _Geometry, stores: _Stores
) -> Iterator[Call]:
    flow = DATAFLOW[schedule.direction]
    sides = ((flow.q_input, flow.q_result), (flow.k_input, flow.k_result))
    for q_span, k_span in _kernel_rectangles(tiles, schedule, stores, sides):
        q_positions, k_positions = geometry.joined_positions(q_span), geometry.joined_positions(k_span)
        area = schedule.areas.between(q_positions, k_positions)
        if area:
            yield Call(
                q=stores.operand(flow.q_input, q_span),
                k=stores.operand(flow.k_input, k_span),
                q_result=stores.operand(flow.q_result, q_span),
                k_result=stores.operand(flow.k_result, k_span) if flow.k_result else None,
                q_positions=q_positions,
                k_positions=k_positions,
                area=area,
            )


_Sides = tuple[tuple[Payload, Payload], tuple[Payload, Payload | None]]
"""Input and result of the query side, and of the key side."""


def _kernel_rectangles(
    tiles: tuple[Tile, ...], schedule: Schedule, stores: _Stores, sides: _Sides
) -> Iterator[tuple[Span, Span]]:
    """Tiles of single chunks, combined into rectangles; and rectangles, cut where the stores of their chunks end."""
    q_side, k_side = sides
    singles = {tile for tile in tiles if tile.queries == tile.keys == 1}
    yield from _rectangles(
        singles,
        joined_q=lambda chunk: stores.joined(q_side, chunk),
        joined_k=lambda chunk: stores.joined(k_side, chunk),
        empty=lambda tile: not schedule.areas(tile),
    )
    for tile in tiles:
        if tile not in singles:
            for q_span in stores.parts(q_side, tile.q_chunks):
                for k_span in stores.parts(k_side, tile.k_chunks):
                    yield q_span, k_span


def _rectangles(
    tiles: set[Tile],
    *,
    joined_q: Callable[[int], bool],
    joined_k: Callable[[int], bool],
    empty: Callable[[Tile], bool],
) -> Iterable[tuple[Span, Span]]:
    """Cover ``tiles`` with disjoint rectangles of adjacent chunks, which may include tiles without work."""
    left = set(tiles)
    q_chunks, k_chunks = {tile.q for tile in tiles}, {tile.k for tile in tiles}

    def fits(q_span: Span, k_span: Span) -> bool:
        new = [Tile(q, k) for q in range(q_span.first, q_span.stop) for k in range(k_span.first, k_span.stop)]
        return all(tile in left or empty(tile) for tile in new) and any(tile in left for tile in new)

    while left:
        corner = min(left)
        q, k = Span(corner.q, corner.q + 1), Span(corner.k, corner.k + 1)
        while q.stop in q_chunks and joined_q(q.stop) and fits(Span(q.stop, q.stop + 1), k):
            q = Span(q.first, q.stop + 1)
        while k.stop in k_chunks and joined_k(k.stop) and fits(q, Span(k.stop, k.stop + 1)):
            k = Span(k.first, k.stop + 1)
        left -= {Tile(i, j) for i in range(q.first, q.stop) for j in range(k.first, k.stop)}
        yield q, k


def _mark_last_uses(steps: list[ProgramStep], direction: Direction) -> tuple[ProgramStep, ...]:
    flow = DATAFLOW[direction]
    seen: set[tuple[Payload, Span]] = set()
    marked = []
    for step in reversed(steps):
        read = {
            (payload, operand.store)
            for call in step.calls
            for payload, operand in ((flow.q_input, call.q), (flow.k_input, call.k))
            if operand.store is not OWN
        }
        read |= {(send.payload, send.store) for send in step.sends if send.store is not OWN}
        marked.append(replace(step, last_uses=tuple(sorted(read - seen))))
        seen |= read
    return tuple(reversed(marked))


class _Written:
    """Which tokens of each store already hold a result of one payload, and which must be blank."""

    def __init__(self, payload: Payload) -> None:
        self._payload = payload
        self._intervals: dict[Span | None, list[tuple[int, int]]] = {}
        self.blanks: list[Blank] = []

    def touches(self, part: Operand) -> bool:
        """Whether any token of ``part`` already holds a result."""
        return any(a < part.stop and part.start < b for a, b in self._intervals.get(part.store, ()))

    def write(self, part: Operand) -> None:
        """Record that a call overwrites ``part``."""
        self._intervals.setdefault(part.store, []).append((part.start, part.stop))

    def need(self, part: Operand) -> None:
        """Record that ``part`` is read: those of its tokens that hold no result yet must be blank."""
        at = part.start
        for a, b in sorted(self._intervals.get(part.store, ())):
            self._need_blank(part.store, at, min(a, part.stop))
            at = max(at, b)
        self._need_blank(part.store, at, part.stop)
        self.write(part)

    def _need_blank(self, store: Span | None, start: int, stop: int) -> None:
        if start < stop:
            self.blanks.append(Blank(self._payload, Operand(store, start, stop)))


def _mark_fresh(
    steps: list[ProgramStep], flow: Dataflow, shard_length: int, batch_rows: int
) -> tuple[list[ProgramStep], tuple[Blank, ...]]:
    """Find the calls that may overwrite their results, and the regions that must be blank as no such call comes first.

    A result is sent whole, including chunks in which the calls found no work; ``validate`` guarantees that it is not
    updated after the send.
    """
    written = {payload: _Written(payload) for payload in (flow.q_result, flow.k_result) if payload}
    marked = []
    for step in steps:
        calls = []
        for call in step.calls:
            results = ((flow.q_result, call.q_result), (flow.k_result, call.k_result))
            parts = [(written[payload], part) for payload, part in results if payload and part]
            fresh = not any(store.touches(part) for store, part in parts)
            for store, part in parts:
                store.write(part) if fresh else store.need(part)
            calls.append(replace(call, fresh=fresh))
        for transfer in step.sends:
            if transfer.payload in RESULTS:
                written[transfer.payload].need(Operand(transfer.span, 0, transfer.length))
        for transfer in step.receives:
            if transfer.payload in RESULTS:
                written[transfer.payload].need(Operand(OWN, transfer.start, transfer.start + transfer.length))
        marked.append(replace(step, calls=tuple(calls)))
    row_length = shard_length // batch_rows
    for store in written.values():
        for row in range(batch_rows):
            store.need(Operand(OWN, row * row_length, (row + 1) * row_length))
    return marked, tuple(blank for store in written.values() for blank in store.blanks)
