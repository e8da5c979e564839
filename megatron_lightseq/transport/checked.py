"""A transport that finds what the network has changed: every message travels with a checksum of its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from megatron_lightseq.errors import TransportError, explain
from megatron_lightseq.transport.base import Digests, Message, Pending, Transport

_TAGS_OF_CHECKSUMS = 1 << 24
"""Beyond all tags of data."""
_CHECKSUM_BYTES = 8


@dataclass(frozen=True, slots=True)
class _Checked:
    rank: int
    pending: Pending
    receives: tuple[Message, ...]
    """In the order of their checksums."""
    checksums: dict[int, Tensor]
    """By peer: one row per message, received with the messages."""

    def wait(self) -> None:
        self.pending.wait()
        expected = {peer: iter(rows.cpu()) for peer, rows in self.checksums.items()}
        for message in self.receives:
            if not torch.equal(next(expected[message.peer]), _checksum(message.tensor)):
                raise self._changed(message)

    def _changed(self, message: Message) -> TransportError:
        return TransportError(
            explain(
                got=f"rank {self.rank} received {message.what} from rank {message.peer} with other bytes than "
                "were sent",
                rule="with verify_transport (--cp-verify-transport) every message must match its sender's checksum",
                remedy="Test the memory and the network of the two hosts; the step was not applied, and a restart "
                "repeats it",
            )
        )


class CheckedTransport:
    """Sends one more message to each peer, with the checksums of the others (XXH3, 64 bits).

    A message on a GPU is copied to the host to be hashed, at both ends, and the host waits for it.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.rank = transport.rank
        self.size = transport.size

    def start(self, sends: Sequence[Message], receives: Sequence[Message]) -> _Checked:
        """As in :class:`Transport`; ``wait`` raises TransportError for a message that was changed on its way."""
        outgoing, incoming = _by_peer(sends), _by_peer(receives)
        checksums = {
            peer: torch.empty(len(group), _CHECKSUM_BYTES, dtype=torch.uint8, device=group[0].tensor.device)
            for peer, group in incoming.items()
        }
        pending = self._transport.start(
            [*sends, *(_companion(group, _checksums(group)) for group in outgoing.values())],
            [*receives, *(_companion(group, checksums[peer]) for peer, group in incoming.items())],
        )
        ordered = tuple(message for group in incoming.values() for message in group)
        return _Checked(self.rank, pending, ordered, checksums)

    def gather_digests(self, digest: bytes) -> list[bytes]:
        """As in :class:`Transport`."""
        return self._transport.gather_digests(digest)

    def start_digests(self, digest: bytes) -> Digests:
        """As in :class:`Transport`."""
        return self._transport.start_digests(digest)


def _by_peer(messages: Sequence[Message]) -> dict[int, list[Message]]:
    """The messages of each peer by tag: an order that both ends know."""
    found: dict[int, list[Message]] = {}
    for message in sorted(messages, key=lambda message: message.tag):
        found.setdefault(message.peer, []).append(message)
    return found


def _companion(group: list[Message], checksums: Tensor) -> Message:
    """The message that carries the checksums of others; its tag is as unique among those in flight as theirs."""
    first = group[0]
    return Message(first.peer, checksums, _TAGS_OF_CHECKSUMS + first.tag, f"the checksums of {first.what}")


def _checksums(group: list[Message]) -> Tensor:
    return torch.stack([_checksum(message.tensor) for message in group]).to(group[0].tensor.device)


def _checksum(tensor: Tensor) -> Tensor:
    """(8,) uint8, on the host."""
    content = tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data
    return torch.frombuffer(bytearray(xxhash.xxh3_64_digest(content)), dtype=torch.uint8)
