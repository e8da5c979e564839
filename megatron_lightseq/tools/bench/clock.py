"""Timing of calls, and the number of threads they use."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def timed(call: Callable[[], None], clock: Callable[[], float] = time.perf_counter) -> float:
    """Duration of a call in seconds, measured with ``clock``."""
    start = clock()
    call()
    return clock() - start


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Use ``count`` threads for torch's kernels and ours inside this context."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
