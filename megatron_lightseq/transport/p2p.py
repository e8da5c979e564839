"""Point-to-point messages over torch.distributed: NCCL between GPUs, gloo between CPUs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_lightseq.errors import TransportError
from megatron_lightseq.transport.base import Digests, Message, transfer_failed


@dataclass(frozen=True, slots=True)
class _Works:
    """Asynchronous works and what they transfer; NCCL returns one work for all messages."""

    rank: int
    works: list[tuple[dist.Work | None, str]]

    def wait(self) -> None:
        for work, what in self.works:
            try:
                if work is not None:  # torch returns None if this rank is not in the group
                    work.wait()
            except RuntimeError as error:
                raise transfer_failed(self.rank, what, error) from error


class P2PTransport:
    """Transfers as ``isend``/``irecv`` pairs in one process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        # Weak, so that the attentions kept for a group (attention.distributed) do not keep it alive.
        self._group_ref = weakref.ref(group)
        self.rank = group.rank()
        self.size = group.size()
        self._is_nccl = dist.get_backend(group) == "nccl"

    @property
    def _group(self) -> dist.ProcessGroup:
        group = self._group_ref()
        if group is None:
            raise TransportError(f"rank {self.rank}: the process group has been destroyed")
        return group

    def start(self, sends: Sequence[Message], receives: Sequence[Message]) -> _Works:
        """Start all messages: one by one over gloo, in one group call over NCCL. As in :class:`Transport`."""
        if self._is_nccl:
            return self._start_batch(sends, receives)
        works = []
        # Receives first: gloo then writes directly into the buffers instead of holding back data that arrives early.
        for message in receives:
            work = dist.irecv(message.tensor, group=self._group, group_src=message.peer, tag=message.tag)
            works.append((work, f"receiving {message.what} from rank {message.peer}"))
        for message in sends:
            work = dist.isend(message.tensor, group=self._group, group_dst=message.peer, tag=message.tag)
            works.append((work, f"sending {message.what} to rank {message.peer}"))
        return _Works(self.rank, works)

    def _start_batch(self, sends: Sequence[Message], receives: Sequence[Message]) -> _Works:
        """One NCCL group call. NCCL has no tags, so both ends list their messages in tag order."""
        ops = [(dist.isend, message) for message in sends] + [(dist.irecv, message) for message in receives]
        ops.sort(key=lambda op: op[1].tag)
        if not ops:
            return _Works(self.rank, [])
        requests = dist.batch_isend_irecv(
            [dist.P2POp(op, m.tensor, group=self._group, group_peer=m.peer) for op, m in ops]
        )
        what = ", ".join(sorted({f"{message.what} with rank {message.peer}" for _, message in ops}))
        return _Works(self.rank, [(request, f"exchanging {what}") for request in requests])

    def gather_digests(self, digest: bytes) -> list[bytes]:
        """As in :class:`Transport`."""
        return self.start_digests(digest)()

    def start_digests(self, digest: bytes) -> Digests:
        """As in :class:`Transport`, by an asynchronous all-gather. On GPUs, only its own end is waited for."""
        device = torch.device("cuda", torch.cuda.current_device()) if self._is_nccl else torch.device("cpu")
        mine = torch.tensor(list(digest), dtype=torch.uint8, device=device)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        work = dist.all_gather(everyone, mine, group=self._group, async_op=True)
        arrived = self._copied_to_host(work, everyone) if self._is_nccl else None

        def wait() -> list[bytes]:
            if arrived is not None:
                return [bytes(row) for row in arrived().tolist()]
            try:
                work.wait()
            except RuntimeError as error:
                raise transfer_failed(self.rank, "comparing plans with all ranks", error) from error
            return [bytes(other.tolist()) for other in everyone]

        return wait

    @staticmethod
    def _copied_to_host(work: dist.Work, everyone: list[torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Start to copy what NCCL gathers to the host; the result waits for that copy and for nothing else."""
        work.wait()  # the stream, not the host
        host = torch.empty((len(everyone), len(everyone[0])), dtype=torch.uint8, pin_memory=True)
        host.copy_(torch.stack(everyone), non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def wait() -> torch.Tensor:
            copied.synchronize()
            return host

        return wait
