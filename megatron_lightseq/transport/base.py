"""The interface of transports: messages between ranks that are started together and waited for together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_lightseq.errors import TransportError, explain


@dataclass(frozen=True, slots=True)
class Message:
    """One end of a transfer: a contiguous tensor to send or to receive into."""

    peer: int
    """The other rank, by its number in the group."""
    tensor: Tensor
    tag: int
    """Equal at both ends, and unique among the messages in flight between two ranks."""
    what: str
    """Describes the transfer in error messages."""


class Pending(Protocol):
    """Messages in flight."""

    def wait(self) -> None:
        """Return when received tensors may be read and sent tensors may be overwritten.

        On CUDA the current stream waits instead of the host.

        Raises:
            TransportError: a transfer failed; the message names the peer and the transfer.
        """


Digests = Callable[[], list[bytes]]
"""Waits for the digests of all ranks, and returns them in rank order."""


class Transport(Protocol):
    """Connects a rank with its peers in one group."""

    rank: int
    """This rank's number in the group."""
    size: int
    """Ranks in the group."""

    def start(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """Start all messages together and return without waiting for them."""

    def gather_digests(self, digest: bytes) -> list[bytes]:
        """The digests of all ranks, equally long, in rank order; blocks until every rank has called."""

    def start_digests(self, digest: bytes) -> Digests:
        """Start to gather the digests of all ranks, which are equally long, and return without waiting for them.

        Every rank must call, in the same order as its other calls.

        Returns:
            What to call for the digests in rank order; it waits until every rank has called.
        """


def transfer_failed(rank: int, what: str, reason: object) -> TransportError:
    """The error of a transfer that a peer's silence or end has stopped.

    Args:
        rank: this rank's number in the group.
        what: the transfer, such as "receiving kv of chunk 3 (forward step 1) from rank 2".
        reason: what the transport reports.
    """
    return TransportError(
        explain(
            got=f"rank {rank}, {what}: {str(reason).rstrip('. ')}",
            rule="every rank of a group must make the same forward and backward calls in the same order, and its peers "
            "wait for it until the group's timeout",
            remedy="Look for an error on that rank; if there is none, check that it called backward as the others did",
        )
    )
