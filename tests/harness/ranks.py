"""Worker processes with gloo that are reused, so that a multi-rank test does not import torch again.

``run_ranks(world_size, function, *args)`` calls ``function(*args)`` on every rank with torch.distributed
initialised (gloo, loopback) and returns the results in rank order. The function must be importable by name
(defined at module level). If a rank raises, all ranks of that call are stopped and the first error is raised
here with its traceback; the next call starts new processes.
"""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

START_TIMEOUT_S = 120.0
DEFAULT_TIMEOUT_S = 120.0
MAX_THREADS = 60
"""Of a worker between two calls, before it looks for garbage."""
TOO_MANY_THREADS = 300
"""Of a worker between two calls: something keeps its groups, and it is replaced."""


class RankError(AssertionError):
    """A rank of a multi-rank test failed."""


def _serve(pipe: Connection) -> None:
    """Main loop of a worker: receives (rank, world size, store file, function, args), sends a result."""
    os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", MASTER_ADDR="127.0.0.1")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        rank, world_size, store_file, function, args = job
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{store_file}", rank=rank, world_size=world_size
            )
            result = function(*args)
            dist.barrier()
            dist.destroy_process_group()
            _free_groups()
            pipe.send(("ok", result))
        except BaseException as error:  # noqa: BLE001 - any failure is reported to the parent
            pipe.send(("error", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
            return


def _free_groups() -> None:
    """Free destroyed groups that belong to cycles of garbage, such as models."""
    if _num_threads("self") > MAX_THREADS:
        rope = sys.modules.get("megatron_lightseq.megatron.rope")
        if rope is not None:
            rope.forget_angles()
        gc.collect()


def _num_threads(process: int | str) -> int:
    """Each group of gloo has three, and one of them wakes up a hundred times a second: hundreds keep a core busy."""
    return len(os.listdir(f"/proc/{process}/task"))


class RankPool:
    """A growing pool of worker processes; a failed call discards all of them."""

    def __init__(self) -> None:
        self._context = mp.get_context("spawn")
        self._workers: list[tuple[Any, Connection]] = []

    def run(
        self,
        world_size: int,
        function: Callable[..., Any],
        *args: Any,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> list[Any]:
        self._grow(world_size)
        with tempfile.TemporaryDirectory() as folder:
            store_file = os.path.join(folder, "store")
            pipes = [pipe for _, pipe in self._workers[:world_size]]
            for rank, pipe in enumerate(pipes):
                pipe.send((rank, world_size, store_file, function, args))
            results = self._collect(pipes, timeout_s)
        if any(_num_threads(process.pid) > TOO_MANY_THREADS for process, _ in self._workers):
            self.close()
        return results

    def _collect(self, pipes: list[Connection], timeout_s: float) -> list[Any]:
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        while len(results) < len(pipes):
            missing = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
            ready = wait(missing, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = [rank for rank in range(len(pipes)) if rank not in results]
                self.close()
                raise RankError(f"ranks {late} of {len(pipes)} gave no result within {timeout_s} s")
            for pipe in ready:
                rank = pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    status, value = pipe.recv()  # type: ignore[union-attr]
                except (EOFError, ConnectionResetError):
                    status, value = "error", "the process died without a message"
                if status == "error":
                    self.close()
                    raise RankError(f"rank {rank} of {len(pipes)}: {value}")
                results[rank] = value
        return [results[rank] for rank in range(len(pipes))]

    def _grow(self, world_size: int) -> None:
        while len(self._workers) < world_size:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def close(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
        for process, _ in self._workers:
            process.join()
        self._workers = []


_POOL = RankPool()


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = DEFAULT_TIMEOUT_S
) -> list[Any]:
    """Run ``function(*args)`` on ``world_size`` gloo ranks; results in rank order."""
    return _POOL.run(world_size, function, *args, timeout_s=timeout_s)


def close_pool() -> None:
    """Stop the worker processes; pytest calls this at the end of the session."""
    _POOL.close()
