"""THE interpreter of schedules: one loop for every method, both directions and every transport.

A step starts its transfers, computes its calls while they travel, waits, and takes in what arrived. What a
transfer carries and what a call computes is the business of a *pass* (forward or backward); which of them there
are is the business of the program; how bytes travel is the business of the transport.

Token dimension: 0 in (S, B, H, D) tensors, last in (B, H, S) statistics.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megatron_lightseq.kernels.merge import merge_into
from megatron_lightseq.kernels.registry import Kernel, TileMask
from megatron_lightseq.schedule import Payload, Program
from megatron_lightseq.schedule.ir import DATAFLOW, RESULTS
from megatron_lightseq.schedule.program import OWN, Call, Operand, ProgramStep, Span, Transfer
from megatron_lightseq.transport import BufferPool, Message, Pending, Transport

Bundle = tuple[Tensor, ...]
"""The tensors that a payload stands for, all over the same tokens."""
_MAX_BUNDLE = 4


@dataclass(slots=True)
class AttentionStats:
    """Running counts of one rank. Bytes and forwards are exact; the exposed time is wall clock of the host."""

    forwards: int = 0
    """Attention forwards that were computed (a reattached one is not)."""
    backwards: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    exposed_seconds: float = 0.0
    """Time the host spent waiting for transfers after its own kernels. On CUDA streams wait, and this stays 0."""

    def reset(self) -> None:
        """Set every count to zero."""
        self.forwards = self.backwards = self.bytes_sent = self.bytes_received = 0
        self.exposed_seconds = 0.0


class Pass(Protocol):
    """What flows through a program in one direction."""

    @property
    def own(self) -> dict[Payload, Bundle]:
        """The rank's own shard of every payload: inputs are read, results written, whatever they held."""

    def compute(
        self, call: Call, mask: TileMask, q_side: Bundle, k_side: Bundle, results: list[Bundle]
    ) -> None:
        """Run the kernel on one rectangle; ``results`` are the query side's and, in backward, the key side's.

        A fresh call overwrites them, any other adds to what they hold.
        """

    def clear(self, payload: Payload, bundle: Bundle) -> None:
        """Make a result bundle the empty result."""

    def absorb(self, payload: Payload, mine: Bundle, arrived: Bundle) -> None:
        """Join a result that another rank computed into the rank's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardPass:
    """(q, k, v) to a normalised (out, lse)."""

    own: dict[Payload, Bundle]
    kernel: Kernel
    softmax_scale: float

    @staticmethod
    def over(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kernel: Kernel, scale: float
    ) -> ForwardPass:
        """A pass that reads q, k, v and writes out (S, B, H, Dv) and lse (B, H, S), of the accumulator dtype."""
        own = {Payload.Q: (q,), Payload.KV: (k, v), Payload.OUT: (out, lse)}
        return ForwardPass(own=own, kernel=kernel, softmax_scale=scale)

    def compute(
        self, call: Call, mask: TileMask, q_side: Bundle, k_side: Bundle, results: list[Bundle]
    ) -> None:
        """Merge the rectangle into its (out, lse), or write it where nothing came before."""
        (q,), (k, v), (out, lse) = q_side, k_side, results[0]
        self.kernel.forward(
            q, k, v, out, lse, mask=mask, softmax_scale=self.softmax_scale, accumulate=not call.fresh
        )

    def clear(self, payload: Payload, bundle: Bundle) -> None:
        """A row that has seen no key: out 0, lse -inf."""
        out, lse = bundle
        out.zero_()
        lse.fill_(float("-inf"))

    def absorb(self, payload: Payload, mine: Bundle, arrived: Bundle) -> None:
        """Merge by log-sum-exp."""
        merge_into(*mine, *arrived)


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardPass:
    """(q, k, v, dout, lse, delta) to (dq, dk, dv)."""

    own: dict[Payload, Bundle]
    kernel: Kernel
    softmax_scale: float

    @staticmethod
    def over(
        inputs: dict[Payload, Bundle], grads: dict[Payload, Bundle], kernel: Kernel, scale: float
    ) -> BackwardPass:
        """A pass that reads ``inputs`` and writes ``grads``, bundles by payload."""
        return BackwardPass(own={**inputs, **grads}, kernel=kernel, softmax_scale=scale)

    def compute(
        self, call: Call, mask: TileMask, q_side: Bundle, k_side: Bundle, results: list[Bundle]
    ) -> None:
        """Add the rectangle's gradients, or write them where nothing came before."""
        (q, dout, lse, delta), (k, v) = q_side, k_side
        (dq,), (dk, dv) = results
        tensors = (dout, q, k, v, lse, delta, dq, dk, dv)
        fresh, scale = call.fresh, self.softmax_scale
        self.kernel.backward(*tensors, mask=mask, softmax_scale=scale, accumulate=not fresh)

    def clear(self, payload: Payload, bundle: Bundle) -> None:
        """Zeros."""
        for tensor in bundle:
            tensor.zero_()

    def absorb(self, payload: Payload, mine: Bundle, arrived: Bundle) -> None:
        """Add up, in schedule order."""
        for total, part in zip(mine, arrived, strict=True):
            total += part


@dataclass(frozen=True, slots=True)
class BoundProgram:
    """A program with the masks of its calls as kernels want them, on one device."""

    program: Program
    masks: tuple[tuple[TileMask, ...], ...]

    @staticmethod
    def bind(program: Program, device: torch.device) -> BoundProgram:
        """Make the masks of all calls once, as tensors on ``device`` where they need any."""
        masks = tuple(
            tuple(
                TileMask.of(program.mask, call.q_positions, call.k_positions, device) for call in step.calls
            )
            for step in program.steps
        )
        return BoundProgram(program, masks)


@dataclass(slots=True, kw_only=True)
class Runtime:
    """What a rank runs programs with."""

    transport: Transport | None
    """None for a single rank, which has nothing to transfer."""
    overlap: bool = True
    """Compute while transfers travel; False waits for them first, to show what overlap is worth."""
    stats: AttentionStats = field(default_factory=AttentionStats)
    buffers: BufferPool = field(default_factory=BufferPool)

    def run(self, bound: BoundProgram, flow: Pass) -> None:
        """Execute a program; results are left in ``flow.own``.

        Raises:
            TransportError: a transfer failed; the message names the peer, the payload and the step.
        """
        _Execution(self, bound, flow).run()


class _Execution:
    """One run of one program: the loop, and the buffers that are alive."""

    def __init__(self, runtime: Runtime, bound: BoundProgram, flow: Pass) -> None:
        self._runtime = runtime
        self._bound = bound
        self._flow = flow
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
        for payload, bundle in self._flow.own.items():
            self._clear_blanks(payload, OWN, bundle)
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
            return self._made.pop((transfer.payload, transfer.span))
        return self._own_part(transfer)

    def _arrive(self, transfer: Transfer, bundle: Bundle) -> None:
        if transfer.payload in RESULTS:
            self._flow.absorb(transfer.payload, self._own_part(transfer), bundle)
            self._release(bundle)
        else:
            self._received[transfer.payload, transfer.span] = bundle

    def _own_part(self, transfer: Transfer) -> Bundle:
        return _cut(self._flow.own[transfer.payload], transfer.start, transfer.start + transfer.length)

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
        self._flow.compute(call, mask, q_side, k_side, results)

    def _input(self, payload: Payload, operand: Operand) -> Bundle:
        store = self._flow.own[payload] if operand.store is OWN else self._received[payload, operand.store]
        return _cut(store, operand.start, operand.stop)

    def _result(self, payload: Payload, operand: Operand) -> Bundle:
        if operand.store is OWN:
            return _cut(self._flow.own[payload], operand.start, operand.stop)
        key = (payload, operand.store)
        if key not in self._made:
            self._made[key] = self._new_result(payload, operand.store)
        return _cut(self._made[key], operand.start, operand.stop)

    # --- buffers --------------------------------------------------------------------------------------

    def _new_result(self, payload: Payload, span: Span) -> Bundle:
        bundle = self._buffers_for(payload, self._made_lengths[payload, span])
        self._clear_blanks(payload, span, bundle)
        return bundle

    def _clear_blanks(self, payload: Payload, store: Span | None, bundle: Bundle) -> None:
        for blank in self._bound.program.blanks:
            if blank.payload is payload and blank.part.store == store:
                self._flow.clear(payload, _cut(bundle, blank.part.start, blank.part.stop))

    def _buffers_for(self, payload: Payload, length: int) -> Bundle:
        return tuple(
            self._runtime.buffers.take(_with_tokens(tensor, length), tensor.dtype, tensor.device)
            for tensor in self._flow.own[payload]
        )

    def _release(self, bundle: Bundle) -> None:
        for tensor in bundle:
            self._runtime.buffers.give(tensor)


_Key = tuple[Payload, Span]
_Parcel = tuple[Transfer, Bundle]


def _messages(parcels: list[_Parcel], where: str) -> list[Message]:
    """A message a tensor. A statistic's tokens are its last dimension: a part of it is packed first."""
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


def _cut(bundle: Bundle, start: int, stop: int) -> Bundle:
    """Views of the tokens ``[start, stop)`` of every tensor."""
    return tuple(x.narrow(_token_dim(x), start, stop - start) for x in bundle)


def _with_tokens(x: Tensor, length: int) -> tuple[int, ...]:
    """The shape of ``x`` with ``length`` tokens."""
    return (length, *x.shape[1:]) if _token_dim(x) == 0 else (*x.shape[:-1], length)
