"""Brings the traces of all ranks to rank 0, on one clock."""

from __future__ import annotations

import socket
import time
import zlib
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_lightseq.schedule import Network
from megatron_lightseq.training.tracing.times import RankTimes
from megatron_lightseq.transport import Message, Transport

_ROUNDS = 16
_SMALL, _LARGE = 1 << 10, 4 << 20
"""Bytes of the messages whose times show latency and rate."""
_FIRST_TAG = 1 << 20


def host_identity() -> str:
    """Equal on processes that share a monotonic clock."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}".strip()


def gather(mine: RankTimes, device: torch.device) -> list[RankTimes]:
    """The traces of all ranks on rank 0's clock; empty on other ranks. Collective over the world.

    Args:
        mine: this rank's.
        device: where collectives take tensors.
    """
    hosts = [text.decode() for text in _gather_everywhere(mine.host.encode(), device)]
    mine = mine.shifted(_offset(hosts, device))
    found = _gather_on_first(zlib.compress(mine.to_json().encode()), device)
    return [RankTimes.from_json(zlib.decompress(each).decode()) for each in found]


def _offset(hosts: list[str], device: torch.device) -> float:
    """Seconds by which rank 0's clock is ahead of this rank's. Collective over the world.

    The first rank of every other host exchanges messages with rank 0, and takes the middle of the fastest round trip
    for the moment at which rank 0 read its clock (Cristian's algorithm).
    """
    rank = dist.get_rank()
    offset = torch.zeros(len(hosts), dtype=torch.float64, device=device)
    for leader in sorted({hosts.index(host) for host in hosts} - {0}):
        if rank in (0, leader):
            offset[leader] = _compare_clocks(leader, device)
    dist.all_reduce(offset)
    return float(offset[hosts.index(hosts[rank])])


def _compare_clocks(leader: int, device: torch.device) -> float:
    """On ``leader``, how far rank 0's clock is ahead; 0.0 on rank 0."""
    best = (float("inf"), 0.0)
    for _ in range(_ROUNDS):
        reading = torch.zeros(1, dtype=torch.float64, device=device)
        if dist.get_rank() == 0:
            dist.recv(reading, leader)
            _wait_for(device)
            reading.fill_(time.perf_counter())
            dist.send(reading, leader)
            continue
        began = time.perf_counter()
        dist.send(reading, 0)
        dist.recv(reading, 0)
        _wait_for(device)
        ended = time.perf_counter()
        best = min(best, (ended - began, reading.item() - (began + ended) / 2))
    return best[1]


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _gather_everywhere(text: bytes, device: torch.device) -> list[bytes]:
    lengths, padded = _padded(text, device)
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return [_bytes_of(part, length) for part, length in zip(parts, lengths, strict=True)]


def _gather_on_first(text: bytes, device: torch.device) -> list[bytes]:
    lengths, padded = _padded(text, device)
    if dist.get_rank() != 0:
        dist.gather(padded)
        return []
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.gather(padded, parts)
    return [_bytes_of(part, length) for part, length in zip(parts, lengths, strict=True)]


def _padded(text: bytes, device: torch.device) -> tuple[list[int], torch.Tensor]:
    """The lengths of all ranks' texts, and this rank's, as long as the longest."""
    length = torch.tensor([len(text)], device=device)
    lengths = [torch.zeros_like(length) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, length)
    sizes = [int(each.item()) for each in lengths]
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
    padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
    return sizes, padded


def _bytes_of(part: torch.Tensor, length: int) -> bytes:
    return part[:length].cpu().numpy().tobytes()


def measure_link(transport: Transport | None, device: torch.device) -> tuple[float, float]:
    """Latency in seconds and bytes per second of messages between neighbours of a group, all at once. Collective.

    Returns:
        (0, inf) on a single rank.
    """
    if transport is None or transport.size == 1:
        return 0.0, float("inf")
    latency = _exchange_s(transport, _SMALL, device)
    seconds = _exchange_s(transport, _LARGE, device) - latency
    return latency, _LARGE / max(seconds, 1e-9)


def _exchange_s(transport: Transport, num_bytes: int, device: torch.device) -> float:
    """The median time in which every rank sends so much to the next and receives it from the one before."""
    out = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    into = torch.empty_like(out)
    following, preceding = (transport.rank + 1) % transport.size, (transport.rank - 1) % transport.size
    times = []
    for number in range(_ROUNDS):
        tag = _FIRST_TAG + number
        sends = [Message(following, out, tag, "a message to measure the link")]
        receives = [Message(preceding, into, tag, "a message to measure the link")]
        _wait_for(device)
        began = time.perf_counter()
        transport.start(sends, receives).wait()
        _wait_for(device)
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def network_of(times: RankTimes) -> Network | None:
    """What was measured between neighbours, as a network; None on a single rank."""
    if len(times.peers) == 1:
        return None
    return Network(
        name="measured",
        link_bytes_per_s=times.bytes_per_s,
        link_latency_s=times.latency_s,
        ranks_per_node=None,
    )
