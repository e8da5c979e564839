"""Every rank sends something else to every rank: started at once, as NCCL's own all-to-all does it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_lightseq.transport.base import Message, Transport


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that left and reached this rank, and how long its host waited for them."""

    sent: int
    received: int
    seconds: float


def all_to_all(
    transport: Transport,
    outgoing: Sequence[Sequence[Tensor]],
    incoming: Sequence[Sequence[Tensor]],
    what: str,
) -> Traffic:
    """Send ``outgoing[peer]`` to every peer and receive into ``incoming[peer]``; returns when all have arrived.

    Args:
        transport: of the ranks that take part.
        outgoing: tensors by peer; this rank's own entry is copied. Sizes may differ from peer to peer.
        incoming: contiguous tensors by peer, shaped like what the peer sends. Empty ones do not travel.
        what: for people, shown when a transfer fails.

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
