"""All-to-all: every rank sends different tensors to every other rank, all started together, as NCCL does it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_lightseq.transport.base import Message, Transport


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that this rank sent and received, and how long its host waited for them, in seconds."""

    sent: int
    received: int
    seconds: float


def all_to_all(
    transport: Transport,
    outgoing: Sequence[Sequence[Tensor]],
    incoming: Sequence[Sequence[Tensor]],
    what: str,
) -> Traffic:
    """Send ``outgoing[peer]`` to every peer and receive into ``incoming[peer]``; returns when everything has arrived.

    Args:
        transport: connects the ranks that take part.
        outgoing: tensors by peer; this rank's own entry is copied. Sizes may differ between peers.
        incoming: contiguous tensors by peer, of the shapes that the peer sends. Empty tensors do not travel.
        what: describes the transfer in error messages.

    Raises:
        TransportError: a transfer failed.
    """
    for mine, copy in zip(outgoing[transport.rank], incoming[transport.rank], strict=True):
        copy.copy_(mine)
    sends, receives = _messages(outgoing, transport.rank, what), _messages(incoming, transport.rank, what)
    began = time.perf_counter()
    transport.start(sends, receives).wait()
    return Traffic(
        sent=sum(message.tensor.nbytes for message in sends),
        received=sum(message.tensor.nbytes for message in receives),
        seconds=time.perf_counter() - began,
    )


def _messages(parts: Sequence[Sequence[Tensor]], rank: int, what: str) -> list[Message]:
    return [
        Message(peer=peer, tensor=tensor.contiguous(), tag=tag, what=what)
        for peer, tensors in enumerate(parts)
        if peer != rank
        for tag, tensor in enumerate(tensors)
        if tensor.numel()
    ]
