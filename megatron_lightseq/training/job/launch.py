"""What torchrun tells a process about itself. Only this module reads torchrun's variables. No torch."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from dataclasses import dataclass

LAUNCHER = -1
"""In place of a rank: the process that started the ranks."""
_PR_SET_PDEATHSIG = 1  # of Linux's prctl


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """What torchrun tells a process about itself; a process started by hand is rank 0 of 1."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    attempt: int = 0
    """How often torchrun has restarted the ranks."""
    store_host: int = 0
    """The rank whose process holds the job's store, or :data:`LAUNCHER`."""

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
            store_host=LAUNCHER if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0,
        )

    @property
    def store_prefix(self) -> str:
        """Prefix of the keys of this attempt.

        torchrun may keep one store over restarts, with the dead ranks' keys in it. On several machines it makes a new
        store (the launch scripts ask it to), and there each machine counts its own restarts.
        """
        return attempt_prefix(self.attempt) if self.world_size == self.local_world_size else "mls"


def attempt_prefix(attempt: int) -> str:
    """Prefix of the keys of one attempt on one host."""
    return f"mls/{attempt}"


def end_with_launcher() -> None:
    """Have the kernel kill this process when the one that started it dies, so that no rank outlives its launcher.

    Does nothing for a process that torchrun did not start, and on systems other than Linux.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), signal.SIGKILL)
