"""The last use of the job's store: the rank that hosts it leaves after all others.

Where ranks are started by srun or mpirun, and under torchrun on several hosts, the store lives in the process of rank
0. If that process exits while another rank still asks the store, the other rank fails at the end of a good run.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import torch.distributed as dist

LEAVE_WITHIN_S = 30.0
"""How long the host of the store waits for the other ranks."""
_LEFT = "left"


def leave_store(
    store: dist.Store, *, rank: int, world_size: int, store_host: int = 0, timeout_s: float = LEAVE_WITHIN_S
) -> None:
    """The last use of a store: return on the host of the store once all other ranks have returned here.

    Args:
        store: of the job.
        rank: of this process.
        world_size: number of ranks that use the store.
        store_host: the rank whose process holds the store; none of them if the launcher does.
        timeout_s: how long the host waits for the others.
    """
    with contextlib.suppress(RuntimeError, dist.DistError):  # if the store is gone, there is nothing to do
        if rank != store_host:
            store.add(_LEFT, 1)
            return
        wait_until(lambda: store.add(_LEFT, 0) >= world_size - 1, timeout_s)


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Whether the condition has become true within the time."""
    deadline = time.monotonic() + timeout_s
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return met
