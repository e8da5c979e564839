"""The interpreter of schedules: one loop for every method, tiles and states, both directions and every transport.

A step starts its transfers, runs its kernel calls while they travel, waits for them, and takes in what arrived. The
program says which calls and transfers there are, a *pass* (forward or backward) says what a transfer carries and
what a call computes, and the transport moves the bytes.

Token dimension: 0 in (S, B, H, D) tensors, last in (B, H, S) statistics.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch

from megatron_lightseq.attention.passes import Bundle, Pass
from megatron_lightseq.attention.results import Shard, cut, results_of
from megatron_lightseq.attention.stats import AttentionStats
from megatron_lightseq.attention.trace import Marks, NoMarks
from megatron_lightseq.kernels.tile_mask import TileMask
from megatron_lightseq.schedule import Direction, Payload, Program
from megatron_lightseq.schedule.ir import DATAFLOW, RESULTS
from megatron_lightseq.schedule.program import OWN, Operand, ProgramStep, Span, Transfer
from megatron_lightseq.transport import BufferPool, Message, Pending, Transport

_MAX_BUNDLE = 4
_NO_MARKS = NoMarks()


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
                (call if number == 0 else replace(call, fresh=False, area=0), mask)
                for call in step.calls
                for number, mask in enumerate(
                    TileMask.of(program.mask, call.q_positions, call.k_positions, device)
                )
            ]
            steps.append(replace(step, calls=tuple(call for call, _ in bound)))
            masks.append(tuple(mask for _, mask in bound))
        return BoundProgram(replace(program, steps=tuple(steps)), tuple(masks))


class Parcel(NamedTuple):
    """One end of a transfer: the tensors that one message each carries."""

    peer: int
    tag: int
    """Number of the transfer among those of an execution: equal at both ends and unique."""
    what: str
    """Describes it in error messages."""
    bundle: Bundle


class Steps(Protocol):
    """One execution of a schedule on one rank: what it sends, receives and computes in each step."""

    direction: Direction
    kind: str
    """What a trace calls it."""

    def __len__(self) -> int:
        """The number of steps."""

    def outgoing(self, t: int) -> list[Parcel]:
        """What is sent in step t."""

    def incoming(self, t: int) -> list[Parcel]:
        """Buffers for what is received in step t."""

    def compute(self, t: int, marks: Marks) -> None:
        """What is computed in step t, while transfers travel. Kernel calls are marked."""

    def take_in(self, t: int, outgoing: list[Parcel], incoming: list[Parcel]) -> None:
        """Use what has arrived in step t, and free what has been sent."""


@dataclass(slots=True, kw_only=True)
class Runtime:
    """Executes schedules: a rank's transport, receive buffers and counts."""

    transport: Transport | None
    """None for a single rank, which has nothing to transfer."""
    overlap: bool = True
    """Compute while transfers travel. False waits for them first, which shows what overlap saves."""
    stats: AttentionStats = field(default_factory=AttentionStats)
    buffers: BufferPool = field(default_factory=BufferPool)
    ranks: tuple[int, ...] | None = None
    """The ranks that run a schedule together, as numbered in the context-parallel group; None: all of them."""

    def run(self, bound: BoundProgram, data: Pass) -> None:
        """Execute a program; the results are in ``data.own``.

        Raises:
            TransportError: a transfer failed; the message names the peer, the payload and the step.
        """
        steps = _TileSteps(bound, data, self.buffers)
        steps.begin()
        self.execute(steps)
        steps.end()

    def execute(self, steps: Steps) -> None:
        """The only loop over steps, of tiles and of states.

        Raises:
            TransportError: a transfer failed; the message names the peer, the payload and the step.
        """
        marks, place, num_steps = self._marks(steps), self.stats.place, len(steps)
        for t in range(num_steps):
            place.enter(steps.direction, t, num_steps)
            outgoing, incoming = steps.outgoing(t), steps.incoming(t)
            marks.step(outgoing)
            pending = self._start(f"{steps.direction} step {t}", outgoing, incoming)
            if not self.overlap:
                self._wait(pending)
            marks.started()
            steps.compute(t, marks)
            marks.computed()
            if self.overlap:
                self._wait(pending)
            steps.take_in(t, outgoing, incoming)
            marks.ended()
        place.leave()

    def _marks(self, steps: Steps) -> Marks:
        if self.stats.trace is None:
            return _NO_MARKS
        size = 1 if self.transport is None else self.transport.size
        ranks = self.ranks or tuple(range(size))
        return self.stats.trace.execution(steps.kind, ranks, self.stats.place.layer)

    def _start(self, where: str, outgoing: list[Parcel], incoming: list[Parcel]) -> Pending | None:
        if not outgoing and not incoming:
            return None
        assert self.transport is not None, "a single rank has no transfers"
        sends, receives = _messages(outgoing, where), _messages(incoming, where)
        self.stats.bytes_sent += sum(message.tensor.nbytes for message in sends)
        self.stats.bytes_received += sum(message.tensor.nbytes for message in receives)
        return self.transport.start(sends, receives)

    def _wait(self, pending: Pending | None) -> None:
        if pending is None:
            return
        began = time.perf_counter()
        pending.wait()
        self.stats.exposed_seconds += time.perf_counter() - began


class _TileSteps:
    """One execution of one program: the received inputs that are in use, and the results."""

    def __init__(self, bound: BoundProgram, data: Pass, buffers: BufferPool) -> None:
        self._bound = bound
        self.direction = bound.program.direction
        self.kind = str(self.direction)
        self._dataflow = DATAFLOW[self.direction]
        self._shard = Shard(bound.program, data, buffers)
        self._results = results_of(self._shard)
        self._received: dict[_Key, Bundle] = {}

    def __len__(self) -> int:
        return len(self._bound.program.steps)

    def begin(self) -> None:
        self._results.begin()

    def end(self) -> None:
        self._results.end()

    def outgoing(self, t: int) -> list[Parcel]:
        return [_parcel(transfer, self._outgoing(transfer)) for transfer in self._step(t).sends]

    def incoming(self, t: int) -> list[Parcel]:
        return [_parcel(transfer, self._incoming(transfer)) for transfer in self._step(t).receives]

    def compute(self, t: int, marks: Marks) -> None:
        for call, mask in zip(self._step(t).calls, self._bound.masks[t], strict=True):
            q_side = self._input(self._dataflow.q_input, call.q)
            self._results.compute(call, mask, q_side, self._input(self._dataflow.k_input, call.k))
            marks.call(call.q_positions, call.k_positions, call.area)

    def take_in(self, t: int, outgoing: list[Parcel], incoming: list[Parcel]) -> None:
        step = self._step(t)
        for transfer, parcel in zip(step.receives, incoming, strict=True):
            self._arrive(transfer, parcel.bundle)
        for transfer, parcel in zip(step.sends, outgoing, strict=True):
            if transfer.payload in RESULTS:
                self._shard.release(parcel.bundle)
        for key in step.last_uses:
            self._shard.release(self._received.pop(key))

    def _step(self, t: int) -> ProgramStep:
        return self._bound.program.steps[t]

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

    def _input(self, payload: Payload, operand: Operand) -> Bundle:
        if operand.store is OWN:
            return self._shard.own(payload, operand.start, operand.stop)
        return cut(self._received[payload, operand.store], operand.start, operand.stop)


_Key = tuple[Payload, Span]


def _parcel(transfer: Transfer, bundle: Bundle) -> Parcel:
    return Parcel(transfer.peer, transfer.tag, str(transfer), bundle)


def _messages(parcels: list[Parcel], where: str) -> list[Message]:
    """One message per tensor. Tokens are the last dimension of statistics, so parts of them are made contiguous."""
    return [
        Message(
            peer=parcel.peer,
            tensor=tensor.contiguous(),
            tag=parcel.tag * _MAX_BUNDLE + index,
            what=f"{parcel.what} ({where})",
        )
        for parcel in parcels
        for index, tensor in enumerate(parcel.bundle)
    ]
