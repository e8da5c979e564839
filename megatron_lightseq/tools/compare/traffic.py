"""Counts the bytes that a rank sends through torch.distributed and the time it waits there, for any system.

Bytes are those of the algorithms that gloo and NCCL use for large tensors: rings in which each of P ranks sends
(P - 1) / P of the gathered or reduced tensor. On gloo, a reduce-scatter is an all-reduce that discards the other parts
(ProcessGroupGloo.cpp), and is counted as one. scripts/compare_two_hosts.sh compares the counts with those of a network
interface.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

_WATCHED_PACKAGES = ("megatron.core", "megatron_lightseq")
_POINT_TO_POINT = ("send", "isend", "recv", "irecv")


@dataclass(slots=True)
class Traffic:
    """Running counts of one rank."""

    bytes_sent: int = 0
    calls: int = 0
    """Number of collectives and sends."""
    seconds: float = 0.0
    """Wall clock time in blocking calls and waits, during which the host computes nothing."""

    def reset(self) -> None:
        """Set all counts to zero."""
        self.bytes_sent = self.calls = 0
        self.seconds = 0.0


class _TimedWork:
    """A ``Work`` whose waits are timed; everything else is passed through."""

    def __init__(self, work: Any, traffic: Traffic) -> None:
        self._work, self._traffic = work, traffic

    def wait(self, *args: Any) -> Any:
        began = time.perf_counter()
        try:
            return self._work.wait(*args)
        finally:
            self._traffic.seconds += time.perf_counter() - began

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def _size(tensors: Any) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.nbytes
    return sum(_size(tensor) for tensor in tensors)


def _ring(size: int, group: dist.ProcessGroup, passes: int = 1) -> int:
    ranks = dist.get_world_size(group)
    return passes * size * (ranks - 1) // ranks


def _reduce_scatter(whole: Any, group: dist.ProcessGroup) -> int:
    return _ring(_size(whole), group, passes=2 if dist.get_backend(group) == "gloo" else 1)


def _broadcast(tensor: torch.Tensor, src: int | None, group: dist.ProcessGroup) -> int:
    return tensor.nbytes if src is not None and src == dist.get_rank() else 0


_Bytes = Callable[[dict[str, Any], Any], int]
_COUNTED: dict[str, tuple[tuple[str, ...], _Bytes]] = {
    "all_reduce": (("tensor",), lambda a, g: _ring(_size(a["tensor"]), g, passes=2)),
    "all_gather": (("tensor_list", "tensor"), lambda a, g: _ring(_size(a["tensor_list"]), g)),
    "all_gather_into_tensor": (
        ("output_tensor", "input_tensor"),
        lambda a, g: _ring(_size(a["output_tensor"]), g),
    ),
    "reduce_scatter": (("output", "input_list"), lambda a, g: _reduce_scatter(a["input_list"], g)),
    "reduce_scatter_tensor": (("output", "input"), lambda a, g: _reduce_scatter(a["input"], g)),
    "all_to_all": (
        ("output_tensor_list", "input_tensor_list"),
        lambda a, g: _ring(_size(a["input_tensor_list"]), g),
    ),
    "all_to_all_single": (("output", "input"), lambda a, g: _ring(_size(a["input"]), g)),
    "broadcast": (("tensor", "src"), lambda a, g: _broadcast(a["tensor"], a.get("src"), g)),
    "send": (("tensor",), lambda a, g: _size(a["tensor"])),
    "isend": (("tensor",), lambda a, g: _size(a["tensor"])),
    "recv": (("tensor",), lambda a, g: 0),
    "irecv": (("tensor",), lambda a, g: 0),
}
"""By function of torch.distributed: its first parameters, and a function for the bytes that a call sends."""


@contextmanager
def watch_traffic(traffic: Traffic) -> Iterator[Traffic]:
    """Inside this context, calls to torch.distributed's collectives and sends are counted in ``traffic``.

    This includes functions that modules of Megatron or this package have imported by name.
    """
    watched = [dist, *(module for name, module in sys.modules.items() if name.startswith(_WATCHED_PACKAGES))]
    # torch compares the functions in a P2POp with its own isend and irecv, so these must be replaced as well.
    places = {name: [*watched, *([c10d] if name in _POINT_TO_POINT else [])] for name in _COUNTED}
    substitutes = [(getattr(dist, name), _counted(name, traffic), places[name]) for name in _COUNTED]
    manager = c10d._coalescing_manager
    substitutes.append((manager, _timed_coalescing(manager, traffic), watched))
    undo: list[tuple[Any, str, Any]] = []
    for original, substitute, modules in substitutes:
        for module in modules:
            for name in [name for name, value in vars(module).items() if value is original]:
                undo.append((module, name, original))
                setattr(module, name, substitute)
    try:
        yield traffic
    finally:
        for module, name, original in undo:
            setattr(module, name, original)


def _counted(name: str, traffic: Traffic) -> Callable[..., Any]:
    function = getattr(dist, name)
    parameters, bytes_of = _COUNTED[name]

    def call(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}
        group = kwargs.get("group") or next((a for a in args if isinstance(a, dist.ProcessGroup)), None)
        traffic.bytes_sent += bytes_of(given, group or dist.group.WORLD)
        traffic.calls += 1
        began = time.perf_counter()
        work = function(*args, **kwargs)
        traffic.seconds += time.perf_counter() - began
        return work if work is None or isinstance(work, int) else _TimedWork(work, traffic)

    return call


def _timed_coalescing(
    function: Callable[..., AbstractContextManager[Any]], traffic: Traffic
) -> Callable[..., AbstractContextManager[Any]]:
    """Coalesced collectives run when the context exits, so its exit is timed."""

    @contextmanager
    def manager(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with function(*args, **kwargs) as inner:
            yield inner
            began = time.perf_counter()
        traffic.seconds += time.perf_counter() - began

    return manager
