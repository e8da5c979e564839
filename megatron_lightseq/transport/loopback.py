"""P ranks as P threads of one process: everything runs, autograd included, without a process group.

outputs = run_loopback(4, lambda group: dist_attention(q[group.rank()], ..., group=group))
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from megatron_lightseq.errors import TransportError
from megatron_lightseq.transport.base import Digests, Message, transfer_failed

T = TypeVar("T")
TIMEOUT_S = 60.0
"""How long to wait for a message before its sender is considered stuck."""


@dataclass(slots=True)
class _Network:
    """Mailboxes of all ranks, keyed by (source, destination, tag)."""

    size: int
    changed: threading.Condition = field(default_factory=threading.Condition)
    mail: dict[tuple[int, int, Any], list[Any]] = field(default_factory=dict)
    failed_rank: int | None = None

    def put(self, src: int, dst: int, tag: Any, content: Any) -> None:
        with self.changed:
            self.mail.setdefault((src, dst, tag), []).append(content)
            self.changed.notify_all()

    def take(self, src: int, dst: int, tag: Any, what: str) -> Any:
        box = (src, dst, tag)
        with self.changed:
            self.changed.wait_for(lambda: self.mail.get(box) or self.failed_rank is not None, TIMEOUT_S)
            if self.mail.get(box):
                return self.mail[box].pop(0)
        reason = (
            f"rank {self.failed_rank} failed" if self.failed_rank is not None else f"silent for {TIMEOUT_S} s"
        )
        raise transfer_failed(dst, f"receiving {what} from rank {src}", reason)

    def abort(self, rank: int) -> None:
        with self.changed:
            if self.failed_rank is None:
                self.failed_rank = rank
            self.changed.notify_all()


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class LoopbackGroup:
    """One rank's handle on the group, used in place of a ``torch.distributed.ProcessGroup``."""

    network: _Network
    index: int

    def rank(self) -> int:
        """This rank's number in the group, from 0."""
        return self.index

    def size(self) -> int:
        """The number of ranks."""
        return self.network.size


@dataclass(frozen=True, slots=True)
class _Mail:
    network: _Network
    rank: int
    receives: tuple[Message, ...]

    def wait(self) -> None:
        for message in self.receives:
            received: Tensor = self.network.take(message.peer, self.rank, message.tag, message.what)
            if received.shape != message.tensor.shape or received.dtype != message.tensor.dtype:
                raise TransportError(
                    f"rank {self.rank}, receiving {message.what} from rank {message.peer}: expected "
                    f"{message.tensor.dtype} {tuple(message.tensor.shape)}, "
                    f"got {received.dtype} {tuple(received.shape)}"
                )
            message.tensor.copy_(received)


class LoopbackTransport:
    """Messages through memory. They are copied when they are sent, so that the sender may overwrite them."""

    def __init__(self, group: LoopbackGroup) -> None:
        self._network = group.network
        self.rank = group.rank()
        self.size = group.size()
        self._gathered = 0

    def start(self, sends: Sequence[Message], receives: Sequence[Message]) -> _Mail:
        """Copy the messages to send; receiving happens in ``wait``. As in :class:`Transport`."""
        for message in sends:
            self._network.put(self.rank, message.peer, message.tag, message.tensor.detach().clone())
        return _Mail(self._network, self.rank, tuple(receives))

    def gather_digests(self, digest: bytes) -> list[bytes]:
        """As in :class:`Transport`."""
        return self.start_digests(digest)()

    def start_digests(self, digest: bytes) -> Digests:
        """As in :class:`Transport`."""
        self._gathered += 1
        tag = f"digest {self._gathered}"
        for peer in range(self.size):
            self._network.put(self.rank, peer, tag, digest)

        def wait() -> list[bytes]:
            return [self._network.take(peer, self.rank, tag, "a fingerprint") for peer in range(self.size)]

        return wait


def run_loopback(size: int, function: Callable[[LoopbackGroup], T]) -> list[T]:
    """Call ``function(group)`` on ``size`` ranks, one thread each, and return the results in rank order.

    If a rank raises, the others stop waiting for it, and the first error is raised here.
    """
    network = _Network(size)
    errors: list[BaseException] = []

    def rank_main(rank: int) -> T | None:
        try:
            return function(LoopbackGroup(network, rank))
        except BaseException as error:  # noqa: BLE001 - handed to the caller below
            with network.changed:
                errors.append(error)
            network.abort(rank)
            return None

    with ThreadPoolExecutor(max_workers=size) as pool:
        results = list(pool.map(rank_main, range(size)))
    if errors:
        raise errors[0]
    return results  # type: ignore[return-value]  # no error: every rank returned a T
