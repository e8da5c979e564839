"""The interpreter of programs: one loop for every method, both directions and every transport.

A step starts its transfers, runs its kernel calls while they travel, waits for them, and takes in what arrived. The
program says which calls and transfers there are, a *pass* (forward or backward) says what a transfer carries and
what a call computes, and the transport moves the bytes.

Token dimension: 0 in (S, B, H, D) tensors, last in (B, H, S) statistics.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_lightseq.attention.passes import Bundle, Pass
from megatron_lightseq.attention.stats import AttentionStats
from megatron_lightseq.kernels.tile_mask import TileMask
from megatron_lightseq.schedule import Payload, Program
from megatron_lightseq.schedule.ir import DATAFLOW, RESULTS
from megatron_lightseq.schedule.program import OWN, Call, Operand, ProgramStep, Span, Transfer
from megatron_lightseq.transport import BufferPool, Message, Pending, Transport

_MAX_BUNDLE = 4


@dataclass(frozen=True, slots=True)
class BoundProgram:
    """A program with the masks of its calls, in the form that kernels take, on one device.

    A mask of several terms takes several kernel calls for a tile; each is a call of the bound program.
    """

    program: Program
    masks: tuple[tuple[TileMask, ...], ...]

    @staticmethod
    def bind(program: Program, device: torch.device) -> BoundProgram:
        """Compute the masks of all calls once; those that need tensors have them on ``device``."""
        steps, masks = [], []
        for step in program.steps:
            bound = [
                (call if number == 0 else replace(call, fresh=False), mask)
                for call in step.calls
                for number, mask in enumerate(
                    TileMask.of(program.mask, call.q_positions, call.k_positions, device)
                )
            ]
            steps.append(replace(step, calls=tuple(call for call, _ in bound)))
            masks.append(tuple(mask for _, mask in bound))
        return BoundProgram(replace(program, steps=tuple(steps)), tuple(masks))


@dataclass(slots=True, kw_only=True)
class Runtime:
    """Runs programs: a rank's transport, receive buffers and counts."""

    transport: Transport | None
    """None for a single rank, which has nothing to transfer."""
    overlap: bool = True
    """Compute while transfers travel. False waits for them first, which shows what overlap saves."""
    stats: AttentionStats = field(default_factory=AttentionStats)
    buffers: BufferPool = field(default_factory=BufferPool)

    def run(self, bound: BoundProgram, data: Pass) -> None:
        """Execute a program; the results are in ``data.own``.

        Raises:
            TransportError: a transfer failed; the message names the peer, the payload and the step.
        """
        _Execution(self, bound, data).run()


class _Execution:
    """One execution of one program: the loop, and the buffers that are in use."""

    def __init__(self, runtime: Runtime, bound: BoundProgram, data: Pass) -> None:
        self._runtime = runtime
        self._bound = bound
        self._data = data
        self._dataflow = DATAFLOW[bound.program.direction]
        self._received: dict[_Key, Bundle] = {}
        self._made: dict[_Key, Bundle] = {}
        self._made_lengths = {
            (transfer.payload, transfer.span): transfer.length
            for step in bound.program.steps
            for transfer in step.sends
            if transfer.payload in RESULTS
        }

    def run(self) -> None:
        for blank in self._bound.program.blanks:
            if blank.part.store is OWN:
                own = self._cut_own(blank.payload, blank.part.start, blank.part.stop)
                self._data.clear(blank.payload, own)
        for t, (step, masks) in enumerate(zip(self._bound.program.steps, self._bound.masks, strict=True)):
            self._run_step(t, step, masks)

    def _run_step(self, t: int, step: ProgramStep, masks: tuple[TileMask, ...]) -> None:
        outgoing = [(transfer, self._outgoing(transfer)) for transfer in step.sends]
        incoming = [
            (transfer, self._buffers_for(transfer.payload, transfer.length)) for transfer in step.receives
        ]
        pending = self._start(t, outgoing, incoming)
        if not self._runtime.overlap:
            self._wait(pending)
        for call, mask in zip(step.calls, masks, strict=True):
            self._compute(call, mask)
        if self._runtime.overlap:
            self._wait(pending)
        for transfer, bundle in incoming:
            self._arrive(transfer, bundle)
        for transfer, bundle in outgoing:
            if transfer.payload in RESULTS:
                self._release(bundle)
        for key in step.last_uses:
            self._release(self._received.pop(key))

    # --- transfers ------------------------------------------------------------------------------------

    def _outgoing(self, transfer: Transfer) -> Bundle:
        if transfer.payload in RESULTS:
            self._result(
                transfer.payload, Operand(transfer.span, 0, transfer.length)
            )  # blank if no call made it
            return self._made.pop((transfer.payload, transfer.span))
        source = Operand(transfer.store, transfer.start, transfer.start + transfer.length)
        return self._input(transfer.payload, source)

    def _arrive(self, transfer: Transfer, bundle: Bundle) -> None:
        if transfer.payload in RESULTS:
            self._data.absorb(transfer.payload, self._own_part(transfer), bundle)
            self._release(bundle)
        else:
            self._received[transfer.payload, transfer.span] = bundle

    def _own_part(self, transfer: Transfer) -> Bundle:
        return self._cut_own(transfer.payload, transfer.start, transfer.start + transfer.length)

    def _start(self, t: int, outgoing: list[_Parcel], incoming: list[_Parcel]) -> Pending | None:
        if not outgoing and not incoming:
            return None
        assert self._runtime.transport is not None, "a single rank's program has no transfers"
        where = f"{self._bound.program.direction} step {t}"
        sends, receives = _messages(outgoing, where), _messages(incoming, where)
        self._runtime.stats.bytes_sent += sum(message.tensor.nbytes for message in sends)
        self._runtime.stats.bytes_received += sum(message.tensor.nbytes for message in receives)
        return self._runtime.transport.start(sends, receives)

    def _wait(self, pending: Pending | None) -> None:
        if pending is None:
            return
        began = time.perf_counter()
        pending.wait()
        self._runtime.stats.exposed_seconds += time.perf_counter() - began

    # --- compute --------------------------------------------------------------------------------------

    def _compute(self, call: Call, mask: TileMask) -> None:
        results = [self._result(self._dataflow.q_result, call.q_result)]
        if self._dataflow.k_result is not None and call.k_result is not None:
            results.append(self._result(self._dataflow.k_result, call.k_result))
        q_side = self._input(self._dataflow.q_input, call.q)
        k_side = self._input(self._dataflow.k_input, call.k)
        self._data.compute(call, mask, q_side, k_side, results)

    def _input(self, payload: Payload, operand: Operand) -> Bundle:
        if operand.store is OWN:
            return self._cut_own(payload, operand.start, operand.stop)
        return _cut(self._received[payload, operand.store], operand.start, operand.stop)

    def _result(self, payload: Payload, operand: Operand) -> Bundle:
        if operand.store is OWN:
            return self._cut_own(payload, operand.start, operand.stop)
        key = (payload, operand.store)
        if key not in self._made:
            self._made[key] = self._new_result(payload, operand.store)
        return _cut(self._made[key], operand.start, operand.stop)

    def _cut_own(self, payload: Payload, start: int, stop: int) -> Bundle:
        """Tokens of the rank's own shard; of one row, where rows have masks of their own."""
        bundle, program = self._data.own[payload], self._bound.program
        if program.batch_rows > 1:
            row, first = divmod(start, program.row_length)
            bundle = tuple(x.narrow(_batch_dim(x), row, 1) for x in bundle)
            start, stop = first, first + stop - start
        return _cut(bundle, start, stop)

    # --- buffers --------------------------------------------------------------------------------------

    def _new_result(self, payload: Payload, span: Span) -> Bundle:
        bundle = self._buffers_for(payload, self._made_lengths[payload, span])
        self._clear_blanks(payload, span, bundle)
        return bundle

    def _clear_blanks(self, payload: Payload, store: Span, bundle: Bundle) -> None:
        for blank in self._bound.program.blanks:
            if blank.payload is payload and blank.part.store == store:
                self._data.clear(payload, _cut(bundle, blank.part.start, blank.part.stop))

    def _buffers_for(self, payload: Payload, length: int) -> Bundle:
        batch = 1 if self._bound.program.batch_rows > 1 else None
        return tuple(
            self._runtime.buffers.take(_with_tokens(tensor, length, batch), tensor.dtype, tensor.device)
            for tensor in self._data.own[payload]
        )

    def _release(self, bundle: Bundle) -> None:
        for tensor in bundle:
            self._runtime.buffers.give(tensor)


_Key = tuple[Payload, Span]
_Parcel = tuple[Transfer, Bundle]


def _messages(parcels: list[_Parcel], where: str) -> list[Message]:
    """One message per tensor. Tokens are the last dimension of statistics, so parts of them are made contiguous."""
    return [
        Message(
            peer=transfer.peer,
            tensor=tensor.contiguous(),
            tag=transfer.tag * _MAX_BUNDLE + index,
            what=f"{transfer} ({where})",
        )
        for transfer, bundle in parcels
        for index, tensor in enumerate(bundle)
    ]


def _token_dim(x: Tensor) -> int:
    return 0 if x.dim() == 4 else -1


def _batch_dim(x: Tensor) -> int:
    return 1 if x.dim() == 4 else 0


def _cut(bundle: Bundle, start: int, stop: int) -> Bundle:
    """Views of the tokens ``[start, stop)`` of every tensor."""
    return tuple(x.narrow(_token_dim(x), start, stop - start) for x in bundle)


def _with_tokens(x: Tensor, length: int, batch: int | None) -> tuple[int, ...]:
    """The shape of ``x`` with ``length`` tokens, and with ``batch`` rows where that is not None."""
    shape = list(x.shape)
    shape[_token_dim(x)] = length
    if batch is not None:
        shape[_batch_dim(x)] = batch
    return tuple(shape)
