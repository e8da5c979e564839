"""Starts the ranks of a job, on this host or in network namespaces that play hosts, and collects what they measured.

torchrun is not used: every system needs fresh processes (a peak of memory never goes down), and importing torch and
Megatron in each takes longer than measuring. A fork server imports once, and every rank is a fork of it; on GPUs,
which do not survive a fork, ranks are spawned. Ranks meet in a file, so hosts need no addresses and ports.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from megatron_lightseq.compare import worker_process
from megatron_lightseq.compare.job import OUT_OF_MEMORY, Job, Measurement, Outcome
from megatron_lightseq.compare.systems import SYSTEMS
from megatron_lightseq.errors import UnsupportedError

_LOG_LINES = 12
_POLL_S = 0.05
_WHILE_STARTING = {
    "OMP_NUM_THREADS": "1",  # a library's threads would not survive the fork
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "PYTHONWARNINGS": "ignore",  # Megatron's, on optional packages that are absent
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """Where ranks run."""

    network_namespace: str | None = None
    """Name of a network namespace (``ip netns add NAME``); None for that of this process."""
    interface: str = "lo"
    """The network interface that ranks talk through."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Hosts with equally many ranks each, numbered host by host."""

    hosts: tuple[Host, ...] = (Host(),)
    timeout_s: float = 600.0
    """A job that takes longer is ended and reported as failed."""

    def host_of(self, rank: int, world_size: int) -> Host:
        """The host that runs a rank."""
        return self.hosts[rank * len(self.hosts) // world_size]


def measure(job: Job, cluster: Cluster) -> Outcome:
    """Run a job to its end; never raises for what the job does."""
    try:
        SYSTEMS[job.system].configure(job.common, job.world_size)
    except UnsupportedError as error:
        return Outcome(system=job.system, refusal=str(error))
    with tempfile.TemporaryDirectory(prefix="lightseq-compare-") as folder:
        job = replace(job, folder=folder)
        Path(folder, "job.json").write_text(job.to_json())
        statuses = _run_ranks(job, cluster)
        logs = [Path(folder, f"rank{rank}.log") for rank in range(job.world_size)]
        if OUT_OF_MEMORY in statuses:
            return Outcome(system=job.system, out_of_memory=True, failure="out of the memory it was given")
        failed = [rank for rank, status in enumerate(statuses) if status != 0]
        if failed:
            # The first to fail says why; the others were told to stop, or lost their peer.
            told = [rank for rank in failed if statuses[rank] not in (None, -signal.SIGTERM, -signal.SIGKILL)]
            first = min(told or failed, key=lambda rank: _last_change(logs[rank]))
            return Outcome(system=job.system, failure=f"rank {first}: {_tail(logs[first], statuses[first])}")
        answers = (Path(folder, f"rank{rank}.json").read_text() for rank in range(job.world_size))
        return Outcome(system=job.system, ranks=tuple(map(Measurement.from_json, answers)))


def _run_ranks(job: Job, cluster: Cluster) -> list[int | None]:
    """Exit statuses by rank, negative for a signal; None for a rank that did not end in time."""
    processes = [_start(job, rank, cluster.host_of(rank, job.world_size)) for rank in range(job.world_size)]
    try:
        deadline = time.monotonic() + cluster.timeout_s
        while time.monotonic() < deadline:
            statuses = [process.exitcode for process in processes]
            if None not in statuses or any(statuses):
                break
            time.sleep(_POLL_S)
        time.sleep(_POLL_S)  # ranks that fail together should all be heard
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            if process.exitcode is None:
                process.kill()
            process.join()


def _start(job: Job, rank: int, host: Host) -> BaseProcess:
    context: ForkServerContext | SpawnContext = mp.get_context("forkserver")
    if Path("/dev/nvidiactl").exists():
        context = mp.get_context("spawn")
    else:
        context.set_forkserver_preload([worker_process.__name__, "megatron_lightseq.compare.worker"])
    with _environment(_WHILE_STARTING):
        process = context.Process(
            target=worker_process.main,
            args=(job.folder, rank, host.network_namespace, host.interface),
            daemon=True,
        )
        process.start()
    return process


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for processes that are started inside."""
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
