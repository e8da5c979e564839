"""How long this process waits for other ranks inside collectives and transfers.

A slow rank makes all others wait for it, so that the steps of all ranks take equally long. What tells them apart is the
time between the waits. Host time only: with NCCL the GPU waits and the host goes on.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist


class Waits:
    """Of the main thread: autograd on CPUs, and Megatron's schedules, run there."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """Spent waiting, since counting began."""
        self.since: float | None = None
        """When the wait under way began, on the clock of time.perf_counter; None if there is none."""


@contextmanager
def counting(waits: Waits) -> Iterator[None]:
    """Inside the block, count every ``Work.wait``, which all blocking calls of torch.distributed end with."""
    wait = dist.Work.wait
    main = threading.main_thread().ident

    @functools.wraps(wait)
    def counted(work: dist.Work, *arguments: Any, **settings: Any) -> Any:
        if threading.get_ident() != main or waits.since is not None:
            return wait(work, *arguments, **settings)
        waits.since = began = time.perf_counter()
        try:
            return wait(work, *arguments, **settings)
        finally:
            waits.since = None
            waits.seconds += time.perf_counter() - began

    dist.Work.wait = counted  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        dist.Work.wait = wait  # type: ignore[method-assign]
