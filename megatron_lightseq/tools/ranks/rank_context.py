"""What a rank of a measurement knows: its number, the rendezvous folder, and how to join the others."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class RankContext:
    """One rank of a task; passed to the task's function."""

    rank: int
    world_size: int
    folder: str
    """Rendezvous folder; shared by all hosts and removed after the task."""
    interface: str | None = None
    """Network interface to the other hosts, whose counters can be read; None on a single host."""

    def pin(self) -> None:
        """Bind this process to core number ``rank`` modulo the number of cores, if the system supports it."""
        if hasattr(os, "sched_setaffinity"):
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[self.rank % len(cores)]})

    def join(self) -> None:
        """Initialise torch.distributed: NCCL with one GPU per rank if there are GPUs, else gloo."""
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
