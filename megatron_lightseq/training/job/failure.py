"""The first failure of a run: what is recorded of it, and how long to wait before a rank is considered lost."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch.distributed as dist

from megatron_lightseq.training.job.launch import LAUNCHER

SET_UP, TRAIN, EVALUATE, SAVE, FINISH = "set-up", "train", "evaluate", "save", "finish"
PHASES = (SET_UP, TRAIN, EVALUATE, SAVE, FINISH)
"""Phases that a rank can be in. :data:`TRAIN` is one optimizer step, with a time limit that adapts to earlier steps."""

EXIT_PEER_FAILED = 3
"""Exit status of a rank that stopped because another one failed; the failing rank itself exits with 1."""

_FAILURE = "failure"


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultLimits:
    """How long to wait before a rank is considered lost, all in seconds."""

    beat_s: float = 0.5
    """Between two heartbeats."""
    silence_s: float = 30.0
    """A rank without a heartbeat for this long is dead or stopped."""
    suspect_silence_s: float = 5.0
    """The same, once a collective has failed."""
    blame_s: float = 12.0
    """How long a rank whose collective failed looks for the rank that caused it."""
    grace_s: float = 3.0
    """How long a main thread may take to leave by itself after a failure elsewhere."""
    step_floor_s: float = 60.0
    """A step is never considered hung before this."""
    step_factor: float = 10.0
    """A step that takes this many times the longest one so far is considered hung."""
    setup_s: float = 600.0
    """Limit for set-up, the first step, evaluation and saving."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """The record of the first failure of a run."""

    rank: int
    """The rank that failed, or :data:`~megatron_lightseq.training.job.launch.LAUNCHER`."""
    step: int
    phase: str
    error: str
    exchange: str = ""
    """Of attention, in words, if the rank was in one."""
    unreachable: bool = False
    """The rank still has a process, which no longer answers or no longer makes progress."""

    def __str__(self) -> str:
        where = f"at step {self.step}" if self.step > 0 else "before the first step"
        who = "the launcher" if self.rank == LAUNCHER else f"rank {self.rank}"
        phase = ", ".join(filter(None, (self.phase, self.exchange)))
        return f"{who} failed {where} ({phase}): {self.error}"


def publish(store: dist.Store, failure: Failure) -> Failure:
    """Record a failure unless one is recorded already; returns the recorded one."""
    first = store.compare_set(_FAILURE, "", json.dumps(asdict(failure)))
    return Failure(**json.loads(first))


def recorded(store: dist.Store) -> Failure | None:
    """The recorded failure, if there is one."""
    return Failure(**json.loads(store.get(_FAILURE))) if store.check([_FAILURE]) else None


def is_communication_error(error: BaseException) -> bool:
    """Whether an error may be the echo of another rank's failure: a broken or timed-out collective."""
    if isinstance(error, (dist.DistError, ConnectionError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    return any(word in text for word in ("gloo", "nccl", "connection", "peer", "timed out", "socket"))
