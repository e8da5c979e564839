"""Where one rank sits: who it is, where it meets the others, and what it does before it measures."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Seat:
    """A rank of a task, as the task's function is given it."""

    rank: int
    world_size: int
    folder: str
    """Where ranks meet; shared by all hosts, gone with the task."""
    interface: str | None = None
    """The network interface to another host, whose counters may be read; None on one host."""

    def pin(self) -> None:
        """Bind this process to core ``rank`` modulo the cores, where the system can."""
        if hasattr(os, "sched_setaffinity"):
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[self.rank % len(cores)]})

    def join(self) -> None:
        """Initialise torch.distributed: NCCL where there are GPUs, a GPU for each rank, else gloo."""
        import torch
        import torch.distributed as dist

        if torch.cuda.is_available():
            torch.cuda.set_device(self.rank % torch.cuda.device_count())
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo",
            init_method=f"file://{self.folder}/store",
            rank=self.rank,
            world_size=self.world_size,
        )
