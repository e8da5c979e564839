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

from megatron_lightseq.attention.passes import Bundle, Pass
from megatron_lightseq.attention.results import Shard, cut, results_of
from megatron_lightseq.attention.stats import AttentionStats
from megatron_lightseq.kernels.tile_mask import TileMask
from megatron_lightseq.schedule import Payload, Program
from megatron_lightseq.schedule.ir import DATAFLOW, RESULTS
from megatron_lightseq.schedule.program import OWN, Operand, ProgramStep, Span, Transfer
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
    """One execution of one program: the loop, and the received inputs that are in use."""

    def __init__(self, runtime: Runtime, bound: BoundProgram, data: Pass) -> None:
        self._runtime = runtime
        self._bound = bound
        self._dataflow = DATAFLOW[bound.program.direction]
        self._shard = Shard(bound.program, data, runtime.buffers)
        self._results = results_of(self._shard)
        self._received: dict[_Key, Bundle] = {}

    def run(self) -> None:
        self._results.begin()
        for t, (step, masks) in enumerate(zip(self._bound.program.steps, self._bound.masks, strict=True)):
            self._run_step(t, step, masks)
        self._results.end()

    def _run_step(self, t: int, step: ProgramStep, masks: tuple[TileMask, ...]) -> None:
        outgoing = [(transfer, self._outgoing(transfer)) for transfer in step.sends]
        incoming = [(transfer, self._incoming(transfer)) for transfer in step.receives]
        pending = self._start(t, outgoing, incoming)
        if not self._runtime.overlap:
            self._wait(pending)
        for call, mask in zip(step.calls, masks, strict=True):
            q_side = self._input(self._dataflow.q_input, call.q)
            self._results.compute(call, mask, q_side, self._input(self._dataflow.k_input, call.k))
        if self._runtime.overlap:
            self._wait(pending)
        for transfer, bundle in incoming:
            self._arrive(transfer, bundle)
        for transfer, bundle in outgoing:
            if transfer.payload in RESULTS:
                self._shard.release(bundle)
        for key in step.last_uses:
            self._shard.release(self._received.pop(key))

    def _outgoing(self, transfer: Transfer) -> Bundle:
        if transfer.payload in RESULTS:
            return self._results.outgoing(transfer)
        source = Operand(transfer.store, transfer.start, transfer.start + transfer.length)
        return self._input(transfer.payload, source)

    def _incoming(self, transfer: Transfer) -> Bundle:
        if transfer.payload in RESULTS:
            return self._results.incoming(transfer)
        return self._shard.buffers(transfer.payload, transfer.length)

    def _arrive(self, transfer: Transfer, bundle: Bundle) -> None:
        if transfer.payload in RESULTS:
            self._results.arrive(transfer, bundle)
        else:
            self._received[transfer.payload, transfer.span] = bundle

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

    def _input(self, payload: Payload, operand: Operand) -> Bundle:
        if operand.store is OWN:
            return self._shard.own(payload, operand.start, operand.stop)
        return cut(self._received[payload, operand.store], operand.start, operand.stop)


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
