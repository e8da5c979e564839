"""What torchrun tells a process about itself. Only this module reads torchrun's variables."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """What torchrun tells a process about itself; a process started by hand is rank 0 of 1."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    attempt: int = 0
    """How often torchrun has restarted the ranks."""

    @staticmethod
    def from_environment() -> Launch:
        """Read torchrun's variables."""
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        return Launch(
            rank=int(os.environ.get("RANK", "0")),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            world_size=world_size,
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size))),
            attempt=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        )
