"""Where the results of a program go: accumulated in place, or joined in an order that no number of ranks changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_lightseq.attention.passes import Bundle, Pass
from megatron_lightseq.kernels.registry import accumulator_dtype
from megatron_lightseq.kernels.tile_mask import TileMask
from megatron_lightseq.schedule import Payload, Program
from megatron_lightseq.schedule.ir import DATAFLOW
from megatron_lightseq.schedule.joins import Forest, Joins, Node
from megatron_lightseq.schedule.program import OWN, Call, Operand, Span, Transfer
from megatron_lightseq.transport import BufferPool


@dataclass(frozen=True, slots=True)
class Shard:
    """A rank's own data, and buffers like it."""

    program: Program
    data: Pass
    pool: BufferPool

    def own(self, payload: Payload, start: int, stop: int) -> Bundle:
        """Tokens of the rank's own shard; of one row, where rows have masks of their own."""
        bundle, program = self.data.own[payload], self.program
        if program.batch_rows > 1:
            row, first = divmod(start, program.row_length)
            bundle = tuple(x.narrow(_batch_dim(x), row, 1) for x in bundle)
            start, stop = first, first + stop - start
        return cut(bundle, start, stop)

    def buffers(self, payload: Payload, length: int, accumulators: bool = False) -> Bundle:
        """Uninitialised tensors like the shard's with ``length`` tokens; in the accumulator dtype if asked for."""
        batch = 1 if self.program.batch_rows > 1 else None
        return tuple(
            self.pool.take(
                _with_tokens(x, length, batch),
                accumulator_dtype(x.dtype) if accumulators else x.dtype,
                x.device,
            )
            for x in self.data.own[payload]
        )

    def release(self, bundle: Bundle) -> None:
        """Give buffers back."""
        for tensor in bundle:
            self.pool.give(tensor)


class Results(Protocol):
    """What happens to the results of one execution of a program."""

    def begin(self) -> None:
        """Called before the first step."""

    def compute(self, call: Call, mask: TileMask, q_side: Bundle, k_side: Bundle) -> None:
        """Run a call on its inputs."""

    def outgoing(self, transfer: Transfer) -> Bundle:
        """The buffers to send for a result; the caller releases them."""

    def incoming(self, transfer: Transfer) -> Bundle:
        """Buffers to receive a result into."""

    def arrive(self, transfer: Transfer, bundle: Bundle) -> None:
        """Take in what another rank computed; the buffers are no longer the caller's."""

    def end(self) -> None:
        """Called behind the last step: results are then in the rank's own shard."""


class AccumulatedResults:
    """Every call accumulates into one result per chunk, in the order of the schedule."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._flow = DATAFLOW[shard.program.direction]
        self._made: dict[tuple[Payload, Span], Bundle] = {}
        self._lengths = {
            (transfer.payload, transfer.span): transfer.length
            for step in shard.program.steps
            for transfer in step.sends
        }

    def begin(self) -> None:
        """Clear what no call overwrites."""
        for blank in self._shard.program.blanks:
            if blank.part.store is OWN:
                own = self._shard.own(blank.payload, blank.part.start, blank.part.stop)
                self._shard.data.clear(blank.payload, own)

    def compute(self, call: Call, mask: TileMask, q_side: Bundle, k_side: Bundle) -> None:
        """Run a call; it accumulates into its results."""
        results = [self._result(self._flow.q_result, call.q_result)]
        if self._flow.k_result is not None and call.k_result is not None:
            results.append(self._result(self._flow.k_result, call.k_result))
        self._shard.data.compute(call, mask, q_side, k_side, results)

    def outgoing(self, transfer: Transfer) -> Bundle:
        """The whole result of a span."""
        # blank if no call made it
        self._result(transfer.payload, Operand(transfer.span, 0, transfer.length))
        return self._made.pop((transfer.payload, transfer.span))

    def incoming(self, transfer: Transfer) -> Bundle:
        """Buffers for the result of a span."""
        return self._shard.buffers(transfer.payload, transfer.length)

    def arrive(self, transfer: Transfer, bundle: Bundle) -> None:
        """Combine a result with the rank's own."""
        own = self._shard.own(transfer.payload, transfer.start, transfer.start + transfer.length)
        self._shard.data.absorb(transfer.payload, own, bundle)
        self._shard.release(bundle)

    def end(self) -> None:
        """Nothing is left to do."""

    def _result(self, payload: Payload, operand: Operand) -> Bundle:
        if operand.store is OWN:
            return self._shard.own(payload, operand.start, operand.stop)
        key = (payload, operand.store)
        if key not in self._made:
            self._made[key] = self._new_result(payload, operand.store)
        return cut(self._made[key], operand.start, operand.stop)

    def _new_result(self, payload: Payload, span: Span) -> Bundle:
        bundle = self._shard.buffers(payload, self._lengths[payload, span])
        for blank in self._shard.program.blanks:
            if blank.payload is payload and blank.part.store == span:
                self._shard.data.clear(payload, cut(bundle, blank.part.start, blank.part.stop))
        return bundle


@dataclass(frozen=True, slots=True)
class _Partial:
    """The result of a node."""

    bundle: Bundle
    is_pooled: bool
    """Whether its memory is its own, to be given back; otherwise it is a part of a received message."""


class JoinedResults:
    """Every call makes a leaf, and leaves are joined along the trees of :mod:`schedule.joins`."""

    def __init__(self, shard: Shard, joins: Joins) -> None:
        self._shard = shard
        self._joins = joins
        self._flow = DATAFLOW[shard.program.direction]
        self._forests: dict[tuple[Payload, int], Forest[_Partial]] = {}
        self._leaves: list[tuple[Payload, int, int, Bundle]] = []
        """The results of the last call: payload, grid chunk, leaf; a mask of several terms takes several calls."""
        self._messages: list[Bundle] = []

    def begin(self) -> None:
        """Nothing has to be cleared."""

    def compute(self, call: Call, mask: TileMask, q_side: Bundle, k_side: Bundle) -> None:
        """Run a call; a fresh one begins a leaf."""
        if call.fresh:
            self._finish_leaves()
            i, j = (
                positions.start // self._joins.chunk for positions in (call.q_positions, call.k_positions)
            )
            for payload, chunk, leaf in ((self._flow.q_result, i, j), (self._flow.k_result, j, i)):
                if payload is not None:
                    buffers = self._shard.buffers(payload, self._joins.chunk, accumulators=True)
                    self._leaves.append((payload, chunk, leaf, buffers))
        self._shard.data.compute(call, mask, q_side, k_side, [bundle for *_, bundle in self._leaves])

    def outgoing(self, transfer: Transfer) -> Bundle:
        """All nodes of a span, one after the other."""
        self._finish_leaves()
        sent = self._shard.buffers(transfer.payload, transfer.length, accumulators=True)
        chunks = dict.fromkeys(chunk for chunk, _ in self._joins.carried[transfer.tag])
        parts = [part for chunk in chunks for part in self._forest(transfer.payload, chunk).take()]
        for at, (_, part) in enumerate(parts):
            for whole, x in zip(self._part(sent, at), part.bundle, strict=True):
                whole.copy_(x)
            self._release(part)
        return sent

    def incoming(self, transfer: Transfer) -> Bundle:
        """Buffers for all nodes of a span."""
        return self._shard.buffers(transfer.payload, transfer.length, accumulators=True)

    def arrive(self, transfer: Transfer, bundle: Bundle) -> None:
        """Add the nodes to those that the rank has."""
        self._finish_leaves()
        self._messages.append(bundle)
        for at, (chunk, node) in enumerate(self._joins.carried[transfer.tag]):
            self._add(transfer.payload, chunk, node, _Partial(self._part(bundle, at), is_pooled=False))

    def end(self) -> None:
        """Round the results once, into the rank's own shard."""
        self._finish_leaves()
        payloads = filter(None, (self._flow.q_result, self._flow.k_result))
        for payload in payloads:
            for chunk, start in self._joins.own:
                own = self._shard.own(payload, start, start + self._joins.chunk)
                self._write(payload, own, chunk)
        for bundle in self._messages:
            self._shard.release(bundle)

    def _write(self, payload: Payload, own: Bundle, chunk: int) -> None:
        if (payload, chunk) not in self._joins.leaves:
            self._shard.data.clear(payload, own)
            return
        ((_, root),) = self._forest(payload, chunk).take()
        for x, total in zip(own, root.bundle, strict=True):
            x.copy_(total)
        self._release(root)

    def _finish_leaves(self) -> None:
        for payload, chunk, leaf, bundle in self._leaves:
            self._add(payload, chunk, Node(leaf), _Partial(bundle, is_pooled=True))
        self._leaves = []

    def _add(self, payload: Payload, chunk: int, node: Node, part: _Partial) -> None:
        self._forest(payload, chunk).add(node, part)

    def _forest(self, payload: Payload, chunk: int) -> Forest[_Partial]:
        key = (payload, chunk)
        if key not in self._forests:

            def join(left: _Partial, right: _Partial) -> _Partial:
                self._shard.data.absorb(payload, left.bundle, right.bundle)
                self._release(right)
                return left

            self._forests[key] = Forest(self._joins.leaves[key], join)
        return self._forests[key]

    def _part(self, bundle: Bundle, at: int) -> Bundle:
        return cut(bundle, at * self._joins.chunk, (at + 1) * self._joins.chunk)

    def _release(self, part: _Partial) -> None:
        if part.is_pooled:
            self._shard.release(part.bundle)


def results_of(shard: Shard) -> Results:
    """The results of one execution of the shard's program."""
    joins = shard.program.joins
    return AccumulatedResults(shard) if joins is None else JoinedResults(shard, joins)


def cut(bundle: Bundle, start: int, stop: int) -> Bundle:
    """Views of the tokens ``[start, stop)`` of every tensor."""
    return tuple(x.narrow(_token_dim(x), start, stop - start) for x in bundle)


def _token_dim(x: Tensor) -> int:
    return 0 if x.dim() == 4 else -1


def _batch_dim(x: Tensor) -> int:
    return 1 if x.dim() == 4 else 0


def _with_tokens(x: Tensor, length: int, batch: int | None) -> tuple[int, ...]:
    """The shape of ``x`` with ``length`` tokens, and with ``batch`` rows where that is not None."""
    shape = list(x.shape)
    shape[_token_dim(x)] = length
    if batch is not None:
        shape[_batch_dim(x)] = batch
    return tuple(shape)
