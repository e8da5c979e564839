"""What benchmarks time with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def timed(call: Callable[[], None], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that a call takes, by ``clock``."""
    start = clock()
    call()
    return clock() - start


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many threads for torch's and our kernels within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
