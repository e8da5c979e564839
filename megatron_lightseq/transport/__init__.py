"""Moves tensors between ranks. It does not depend on schedules or kernels."""

from __future__ import annotations

import weakref

import torch.distributed as dist

from megatron_lightseq.transport.all_to_all import all_to_all
from megatron_lightseq.transport.base import Message, Pending, Transport
from megatron_lightseq.transport.buffers import BufferPool
from megatron_lightseq.transport.checked import CheckedTransport
from megatron_lightseq.transport.group import Group
from megatron_lightseq.transport.loopback import LoopbackGroup, LoopbackTransport, run_loopback
from megatron_lightseq.transport.p2p import P2PTransport
from megatron_lightseq.transport.sub import SubTransport

__all__ = [
    "BufferPool",
    "LoopbackGroup",
    "Message",
    "Pending",
    "SubTransport",
    "Transport",
    "all_to_all",
    "connect",
    "pool_of",
    "run_loopback",
]


def connect(group: Group, *, verify: bool = False) -> Transport:
    """The transport for a group; with ``verify``, one that compares a checksum of every message."""
    transport: Transport
    if isinstance(group, LoopbackGroup):
        transport = LoopbackTransport(group)
    else:
        assert isinstance(group, dist.ProcessGroup), type(group)
        transport = P2PTransport(group)
    return CheckedTransport(transport) if verify else transport


def pool_of(group: Group | None) -> BufferPool:
    """The pool of all attention over a group: layers run one after another, so one layer's buffers serve them all.

    A pool of its own for None, a group of one rank that receives nothing.
    """
    if group is None:
        return BufferPool()
    return _POOLS.setdefault(group, BufferPool())


_POOLS: weakref.WeakKeyDictionary[Group, BufferPool] = weakref.WeakKeyDictionary()
"""Dropped with the group."""
