"""One rank's view of a schedule, with chunks turned into slices of tensors.

Chunks that lie side by side in storage and do the same thing at the same step become one *span*: one message
instead of two, one kernel call over a rectangle instead of four over its quarters. What is left for the runtime
is a list of calls and transfers without any arithmetic on ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import groupby

from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule.ir import DATAFLOW, RESULTS, Dataflow, Direction, Move, Payload, Tile
from megatron_lightseq.schedule.schedule import Schedule

OWN = None
"""The store of an operand that lies in the rank's own shard."""


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Chunks ``[first, stop)`` of one owner, adjacent in the sequence and in storage."""

    first: int
    stop: int


@dataclass(frozen=True, slots=True)
class Operand:
    """Tokens ``[start, stop)`` of a store: the rank's own shard, or the buffer of a span that travels."""

    store: Span | None
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Call:
    """One kernel call: a rectangle of tiles."""

    q: Operand
    """Where the queries are read."""
    k: Operand
    """Where the keys and values are read."""
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
    """Nothing has been accumulated into the results yet, so the call may overwrite them."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """One span on its way, seen from one end."""

    payload: Payload
    span: Span
    peer: int
    """The rank at the other end."""
    start: int
    """Where the span begins in its owner's shard, in tokens."""
    length: int
    """Tokens in the span."""
    tag: int
    """Number of this transfer in its schedule; equal at both ends, and no other's."""

    def __str__(self) -> str:
        chunks = f"{self.span.first}" + (
            f"-{self.span.stop - 1}" if self.span.stop - self.span.first > 1 else ""
        )
        return f"{self.payload} of chunk {chunks}"


@dataclass(frozen=True, slots=True)
class ProgramStep:
    """What one rank does side by side: kernel calls, and the transfers in flight meanwhile."""

    calls: tuple[Call, ...]
    sends: tuple[Transfer, ...]
    receives: tuple[Transfer, ...]
    last_uses: tuple[tuple[Payload, Span], ...]
    """Received inputs that no later step reads: their buffers are free after this step."""


@dataclass(frozen=True, slots=True)
class Blank:
    """A part of a result that no fresh call writes first, so that it must hold the empty result from the start."""

    payload: Payload
    part: Operand


@dataclass(frozen=True, slots=True)
class Program:
    """All that one rank does in one direction."""

    rank: int
    direction: Direction
    mask: Mask
    shard_length: int
    """Tokens in the rank's own shard."""
    steps: tuple[ProgramStep, ...]
    blanks: tuple[Blank, ...] = ()
    """What must be empty (out = 0, lse = -inf, gradients = 0) before it is accumulated into or returned."""

    @property
    def merges(self) -> bool:
        """Whether results are put together from parts: of several calls, or of other ranks'."""
        calls = [call for step in self.steps for call in step.calls]
        return any(not call.fresh for call in calls) or any(
            transfer.payload in RESULTS for step in self.steps for transfer in (*step.sends, *step.receives)
        )


@dataclass(frozen=True, slots=True)
class _Geometry:
    """Where every chunk lies in the sequence and in its owner's shard."""

    owner: tuple[int, ...]
    positions: tuple[range, ...]
    offset: tuple[int, ...]

    @staticmethod
    def of(schedule: Schedule) -> _Geometry:
        layout = schedule.layout
        positions = tuple(layout.chunk_positions(c, schedule.seq_length) for c in range(layout.num_chunks))
        offset = [0] * layout.num_chunks
        for rank in range(layout.cp_size):
            filled = 0
            for chunk in layout.chunks_of(rank):
                offset[chunk] = filled
                filled += len(positions[chunk])
        return _Geometry(layout.owner, positions, tuple(offset))

    def adjacent(self, chunk: int) -> bool:
        """Whether ``chunk`` continues ``chunk - 1``: same owner, positions and storage without a gap."""
        before, after = self.positions[chunk - 1], self.positions[chunk]
        return (
            self.owner[chunk - 1] == self.owner[chunk]
            and before.start + len(before) * before.step == after.start
            and self.offset[chunk - 1] + len(before) == self.offset[chunk]
        )

    def spans(self, chunks: Iterable[int]) -> list[Span]:
        """The chunks as maximal spans."""
        spans: list[Span] = []
        for chunk in sorted(chunks):
            if spans and spans[-1].stop == chunk and self.adjacent(chunk):
                spans[-1] = Span(spans[-1].first, chunk + 1)
            else:
                spans.append(Span(chunk, chunk + 1))
        return spans

    def length(self, span: Span) -> int:
        return sum(len(self.positions[chunk]) for chunk in range(span.first, span.stop))

    def joined_positions(self, span: Span) -> range:
        first = self.positions[span.first]
        return range(first.start, first.start + self.length(span) * first.step, first.step)


def compile_program(schedule: Schedule, rank: int) -> Program:
    """The projection of ``schedule`` on ``rank``.

    Pure and deterministic: every rank compiles its own program, and both ends of a transfer get the same tag.
    """
    geometry = _Geometry.of(schedule)
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
                start, length = geometry.offset[span.first], geometry.length(span)
                ends.append(Transfer(payload, span, peer, start, length, tag))
            tag += 1
        calls = _calls(step.tiles[rank], schedule, geometry, stores)
        steps.append(ProgramStep(tuple(calls), tuple(sends), tuple(receives), ()))
    shard_length = schedule.seq_length // schedule.layout.cp_size
    steps, blanks = _mark_fresh(steps, DATAFLOW[schedule.direction], shard_length)
    return Program(
        rank=rank,
        direction=schedule.direction,
        mask=schedule.mask,
        shard_length=shard_length,
        steps=_mark_last_uses(steps, schedule.direction),
        blanks=blanks,
    )


_Message = tuple[Payload, int, int, Span]  # payload, source, destination, chunks


def _coalesce(moves: tuple[Move, ...], geometry: _Geometry) -> list[_Message]:
    """The moves of one step with adjacent chunks joined, in an order that all ranks agree on."""

    def ends(move: Move) -> tuple[Payload, int, int]:
        return move.payload, move.src, move.dst

    return [
        (*key, span)
        for key, group in groupby(sorted(moves, key=ends), key=ends)
        for span in geometry.spans(move.chunk for move in group)
    ]


class _Stores:
    """Finds, for one rank, the store in which a chunk is read or accumulated."""

    def __init__(self, geometry: _Geometry, rank: int, transfers: list[list[_Message]]) -> None:
        self._geometry = geometry
        self._rank = rank
        self._span_of: dict[tuple[Payload, int], Span] = {}
        for payload, src, dst, span in (message for step in transfers for message in step):
            if rank == (src if payload in RESULTS else dst):
                self._span_of.update({(payload, chunk): span for chunk in range(span.first, span.stop)})

    def store(self, payload: Payload, chunk: int) -> Span | None:
        return OWN if self._geometry.owner[chunk] == self._rank else self._span_of[payload, chunk]

    def operand(self, payload: Payload, chunks: Span) -> Operand:
        store = self.store(payload, chunks.first)
        start = self._geometry.offset[chunks.first] - (self._geometry.offset[store.first] if store else 0)
        return Operand(store, start, start + self._geometry.length(chunks))

    def joined(self, payloads: Iterable[Payload | None], chunk: int) -> bool:
        """Whether ``chunk`` lies right behind ``chunk - 1`` in the store of each payload."""
        return self._geometry.adjacent(chunk) and all(
            self.store(payload, chunk) == self.store(payload, chunk - 1) for payload in payloads if payload
        )


def _calls(
    tiles: tuple[Tile, ...], schedule: Schedule, geometry: _Geometry, stores: _Stores
) -> Iterable[Call]:
    flow = DATAFLOW[schedule.direction]
    for q_span, k_span in _rectangles(
        set(tiles),
        joined_q=lambda chunk: stores.joined((flow.q_input, flow.q_result), chunk),
        joined_k=lambda chunk: stores.joined((flow.k_input, flow.k_result), chunk),
        empty=lambda tile: tile not in schedule.work,
    ):
        yield Call(
            q=stores.operand(flow.q_input, q_span),
            k=stores.operand(flow.k_input, k_span),
            q_result=stores.operand(flow.q_result, q_span),
            k_result=stores.operand(flow.k_result, k_span) if flow.k_result else None,
            q_positions=geometry.joined_positions(q_span),
            k_positions=geometry.joined_positions(k_span),
            area=sum(
                schedule.work.get(Tile(q, k), 0)
                for q in range(q_span.first, q_span.stop)
                for k in range(k_span.first, k_span.stop)
            ),
        )


def _rectangles(
    tiles: set[Tile],
    *,
    joined_q: Callable[[int], bool],
    joined_k: Callable[[int], bool],
    empty: Callable[[Tile], bool],
) -> Iterable[tuple[Span, Span]]:
    """Cover ``tiles`` with disjoint rectangles of joined chunks; tiles without work may pad a rectangle."""
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
        marked.append(replace(step, last_uses=tuple(sorted(read - seen))))
        seen |= read
    return tuple(reversed(marked))


class _Written:
    """Which tokens of each store hold a result already, of one payload; and what must be blank instead."""

    def __init__(self, payload: Payload) -> None:
        self._payload = payload
        self._intervals: dict[Span | None, list[tuple[int, int]]] = {}
        self.blanks: list[Blank] = []

    def touches(self, part: Operand) -> bool:
        return any(a < part.stop and part.start < b for a, b in self._intervals.get(part.store, ()))

    def write(self, part: Operand) -> None:
        """A call overwrites ``part``."""
        self._intervals.setdefault(part.store, []).append((part.start, part.stop))

    def need(self, part: Operand) -> None:
        """Something reads ``part`` as it is: where it holds nothing yet, it must be blank."""
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
    steps: list[ProgramStep], flow: Dataflow, shard_length: int
) -> tuple[list[ProgramStep], tuple[Blank, ...]]:
    """Find the calls that may overwrite their results, and what must be blank because no such call comes first.

    What is sent needs no look: every chunk of it was computed, and is never added to again (``validate``).
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
        for transfer in step.receives:
            if transfer.payload in RESULTS:
                written[transfer.payload].need(Operand(OWN, transfer.start, transfer.start + transfer.length))
        marked.append(replace(step, calls=tuple(calls)))
    for store in written.values():
        store.need(Operand(OWN, 0, shard_length))
    return marked, tuple(blank for store in written.values() for blank in store.blanks)
