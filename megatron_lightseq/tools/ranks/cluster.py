"""Starts the ranks of a task, on this host or in network namespaces that act as hosts, and collects their answers.

torchrun is not used: every measurement needs new processes (peak memory never decreases within a process), and
importing torch and Megatron in each of them takes longer than the measurement. A fork server imports them once, and
every rank is forked from it; with GPUs, where CUDA does not survive a fork, ranks are spawned. Ranks rendezvous
through a file, so hosts need no addresses or ports.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from megatron_lightseq.tools.ranks import process
from megatron_lightseq.tools.ranks.rank_context import RankContext

_LOG_LINES = 12
_POLL_S = 0.05
_WHILE_STARTING = {
    "OMP_NUM_THREADS": "1",  # threads of a library do not survive a fork
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "PYTHONWARNINGS": "ignore",  # Megatron warns about optional packages that are not installed
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """Where ranks run."""

    network_namespace: str | None = None
    """Name of a network namespace (``ip netns add NAME``); None for the one of this process."""
    interface: str = "lo"
    """Network interface for communication between ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Hosts with the same number of ranks each; ranks are numbered host by host."""

    hosts: tuple[Host, ...] = (Host(),)
    timeout_s: float = 600.0
    """A task that takes longer is stopped and reported as failed."""

    @staticmethod
    def of(namespaces: str | None, interface: str, timeout_s: float) -> Cluster:
        """This host, or one host per network namespace of a list such as ``A,B``."""
        if namespaces is None:
            return Cluster(timeout_s=timeout_s)
        hosts = tuple(Host(network_namespace=name, interface=interface) for name in namespaces.split(","))
        return Cluster(hosts=hosts, timeout_s=timeout_s)

    def host_of(self, rank: int, world_size: int) -> Host:
        """The host that runs a rank."""
        return self.hosts[rank * len(self.hosts) // world_size]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """What the ranks of a task returned, or why they failed."""

    by_rank: tuple[Any, ...] = ()
    failure: str | None = None
    """The end of the log of the rank that failed first."""
    out_of_memory: bool = False


def run_task(task: str, request: str, world_size: int, cluster: Cluster) -> Answers:
    """Run a function on every rank and collect the results; failures of ranks are returned, not raised.

    Args:
        task: ``package.module:function``; called with ``request`` and a :class:`RankContext`; returns a value that JSON
            can represent.
        request: Text that is passed to the function.
        world_size: Number of ranks.
        cluster: Where the ranks run.
    """
    with tempfile.TemporaryDirectory(prefix="lightseq-ranks-") as folder:
        Path(folder, "request").write_text(request)
        statuses = _run_ranks(task, folder, world_size, cluster)
        if process.OUT_OF_MEMORY in statuses:
            return Answers(out_of_memory=True, failure="exceeded its memory budget")
        logs = [Path(folder, f"rank{rank}.log") for rank in range(world_size)]
        failed = [rank for rank, status in enumerate(statuses) if status != 0]
        if failed:
            # The first rank to fail has the cause; the others were stopped, or lost their peer.
            by_themselves = [
                rank for rank in failed if statuses[rank] not in (None, -signal.SIGTERM, -signal.SIGKILL)
            ]
            first = min(by_themselves or failed, key=lambda rank: _last_change(logs[rank]))
            return Answers(failure=f"rank {first}: {_tail(logs[first], statuses[first])}")
        answers = (Path(folder, f"rank{rank}.json").read_text() for rank in range(world_size))
        return Answers(by_rank=tuple(map(json.loads, answers)))


def _run_ranks(task: str, folder: str, world_size: int, cluster: Cluster) -> list[int | None]:
    """Exit statuses by rank, negative for a signal; None for a rank that did not finish in time."""
    processes = [
        _start(task, folder, rank, world_size, cluster.host_of(rank, world_size))
        for rank in range(world_size)
    ]
    try:
        deadline = time.monotonic() + cluster.timeout_s
        while time.monotonic() < deadline:
            statuses = [rank.exitcode for rank in processes]
            if None not in statuses or any(statuses):
                break
            time.sleep(_POLL_S)
        time.sleep(_POLL_S)  # so that ranks that fail together all get an exit status
        return [rank.exitcode for rank in processes]
    finally:
        for rank in processes:
            if rank.exitcode is None:
                rank.kill()
            rank.join()


def _start(task: str, folder: str, rank: int, world_size: int, host: Host) -> BaseProcess:
    context: ForkServerContext | SpawnContext = mp.get_context("forkserver")
    if Path("/dev/nvidiactl").exists():
        context = mp.get_context("spawn")
    else:
        context.set_forkserver_preload([process.__name__, task.partition(":")[0]])
    rank_context = RankContext(
        rank=rank,
        world_size=world_size,
        folder=folder,
        interface=None if host.network_namespace is None else host.interface,
    )
    with _environment(_WHILE_STARTING):
        started = context.Process(
            target=process.main,
            args=(task, rank_context, host.network_namespace, host.interface),
            daemon=True,
        )
        started.start()
    return started


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for processes that are started in this context."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _last_change(log: Path) -> float:
    return log.stat().st_mtime if log.exists() else float("inf")


def _tail(log: Path, status: int | None) -> str:
    lines: Sequence[str] = (
        [] if not log.exists() else log.read_text(errors="replace").strip().splitlines()[-_LOG_LINES:]
    )
    return "\n".join([f"exit status {status}", *lines])
