"""Memory of a process: what tensors take at most, and a limit on all of it."""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def live_tensor_bytes() -> int:
    """Bytes of all tensors that Python can reach; storage that several share counts once."""
    storages: dict[int, int] = {}
    for candidate in gc.get_objects():
        if type(candidate) in (torch.Tensor, torch.nn.Parameter) and candidate.layout is torch.strided:
            storage = candidate.untyped_storage()
            if storage.device.type != "meta":
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def peak_tensor_bytes(function: Callable[[], Any]) -> int:
    """The most that tensors take at any moment of ``function()``, with those that were there before.

    On CUDA what the allocator saw; on CPUs the allocations and frees that torch's profiler records.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated()
    before = live_tensor_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return before + most


def limit_memory(budget_bytes: int) -> None:
    """Let this process have ``budget_bytes`` more than it has now: allocations beyond that fail.

    Counts private memory (RLIMIT_DATA, Linux 4.7 and later), which is what tensors, gradients and buffers are.
    """
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    now = int(fields["VmData"].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (now + budget_bytes, resource.RLIM_INFINITY))
