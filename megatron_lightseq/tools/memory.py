"""Memory of a process: the peak of its tensors, and a limit for all of it."""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def live_tensor_bytes() -> int:
    """Bytes of all tensors that Python can reach; shared storage counts once."""
    storages: dict[int, int] = {}
    for candidate in gc.get_objects():
        if type(candidate) in (torch.Tensor, torch.nn.Parameter) and candidate.layout is torch.strided:
            storage = candidate.untyped_storage()
            if storage.device.type != "meta":
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def peak_tensor_bytes(function: Callable[[], Any]) -> int:
    """Peak bytes of all tensors during ``function()``, including those that existed before.

    From the allocator's statistics on CUDA, and from the allocations that torch's profiler records on CPUs.
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
    """Limit this process to ``budget_bytes`` more than it uses now; allocations beyond that fail.

    Limits private memory, such as tensors, gradients and buffers (RLIMIT_DATA, Linux 4.7 and later).
    """
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    now = int(fields["VmData"].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (now + budget_bytes, resource.RLIM_INFINITY))
