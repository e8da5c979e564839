"""What a transport is: messages between ranks, started together, waited for together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_lightseq.errors import TransportError, explain


@dataclass(frozen=True, slots=True)
class Message:
    """One end of a transfer: a contiguous tensor to send from or to receive into."""

    peer: int
    """Rank of the other end within the group."""
    tensor: Tensor
    tag: int
    """Equal at both ends; no two messages under way between a pair of ranks share one."""
    what: str
    """For people: shown when the transfer fails."""


class Pending(Protocol):
    """Messages under way."""

    def wait(self) -> None:
        """Return when everything received may be read and everything sent may be overwritten.

        On CUDA the current stream waits, and the host does not.

        Raises:
            TransportError: a transfer failed; the message names the peer and what was on its way.
        """


class Transport(Protocol):
    """A rank's way to its peers in one group."""

    rank: int
    size: int

    def start(self, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
        """Start all messages at once and return without waiting for them."""

    def gather_digests(self, digest: bytes) -> list[bytes]:
        """Every rank's ``digest`` (all of one length), in rank order; blocks until all have called."""


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
