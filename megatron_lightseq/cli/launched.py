"""What torchrun tells a process about itself: the one place that reads its environment variables."""

from __future__ import annotations

import os
from dataclasses import dataclass

from megatron_lightseq.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """This process among those that torchrun started; a process started by hand is rank 0 of 1."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @staticmethod
    def from_environment() -> Rank:
        """Read RANK, LOCAL_RANK and WORLD_SIZE."""
        return Rank(
            rank=int(os.environ.get("RANK", "0")),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
        )

    def speaks_for(self, error: Exception) -> bool:
        """Whether this rank should print an error: files and flags are wrong alike on every rank of a host."""
        return self.local_rank == 0 or not isinstance(error, ConfigError | DataError)
