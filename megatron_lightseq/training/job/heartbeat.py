"""Heartbeats: what every rank writes to the job's store about itself, and what its neighbour concludes from it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import psutil
import torch.distributed as dist

from megatron_lightseq.training.job.board import BoardView, Whereabouts
from megatron_lightseq.training.job.failure import SET_UP, Failure, FaultLimits, recorded
from megatron_lightseq.training.job.words import ranges


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """What a rank reports about itself every half second."""

    count: int
    step: int
    phase: str
    phase_s: float
    """Seconds that the main thread has spent in this phase."""
    exchange: str
    """Of attention, in words; empty if the main thread is not in one."""
    waiting: bool
    """Whether the main thread waits for other ranks, in a collective or a transfer."""
    board: str
    """Path of the rank's :class:`~megatron_lightseq.training.job.board.Board`, on its host."""
    where: str
    """The Python function that the main thread is in."""
    host: str
    pid: int
    started: float
    """Creation time of the process; together with ``pid`` it identifies the process for good."""


class Watch:
    """One rank's own heartbeat, and the age of the next rank's."""

    def __init__(self, *, rank: int, world_size: int, limits: FaultLimits) -> None:
        self._rank = rank
        self._world_size = world_size
        self._limits = limits
        self._next = (rank + 1) % world_size
        self._pid = os.getpid()
        self._started = psutil.Process().create_time()
        self._host = socket.gethostname()
        self._count = 0
        self._last: Heartbeat | None = None
        self._view: BoardView | None = None
        self._changed = time.monotonic()

    def beat(
        self, store: dist.Store, here: Whereabouts, phase_s: float, *, waiting: bool = False, board: str = ""
    ) -> None:
        """Write this rank's next heartbeat."""
        self._count += 1
        beat = Heartbeat(
            count=self._count,
            step=here.step,
            phase=here.phase,
            phase_s=round(phase_s, 1),
            exchange=here.exchange,
            waiting=waiting,
            board=board,
            where=_main_thread_position(),
            host=self._host,
            pid=self._pid,
            started=self._started,
        )
        store.set(beat_key(self._rank), json.dumps(asdict(beat)))

    def look(self, store: dist.Store, *, suspicious: bool) -> Failure | None:
        """The recorded failure, or the one that the next rank's silence amounts to."""
        failure = recorded(store)
        if failure is not None:
            return failure
        beat = read_beat(store, self._next)
        now = time.monotonic()
        if beat is not None and (self._last is None or beat.count != self._last.count):
            self._map_board(beat)
            self._last, self._changed = beat, now
        if self._last is None:
            return None  # not started yet: the limit on set-up covers it
        return self._silence(self._last, now - self._changed, suspicious=suspicious)

    def _silence(self, beat: Heartbeat, silent_s: float, *, suspicious: bool) -> Failure | None:
        limit_s = self._limits.suspect_silence_s if suspicious else self._limits.silence_s
        gone = beat.host == self._host and silent_s > self._limits.beat_s and not is_alive(beat)
        if gone:
            error = f"its process {beat.pid} is gone (killed?)"
        elif silent_s > limit_s:
            error = f"process {beat.pid} on {beat.host} has given no sign of life for {silent_s:.0f} s"
        else:
            return None
        here = self._view.read() if self._view is not None else None
        here = here or Whereabouts(step=beat.step, phase=beat.phase, exchange=beat.exchange)
        return Failure(rank=self._next, **asdict(here), error=error, unreachable=not gone)

    def _map_board(self, beat: Heartbeat) -> None:
        """While the next rank lives, open what is to be read after its death; on this host only."""
        if self._last is None and beat.board and beat.host == self._host:
            with contextlib.suppress(OSError, ValueError):
                self._view = BoardView(beat.board)

    def stuck(self, store: dist.Store, elapsed_s: float) -> Failure:
        """All ranks answer and none makes progress: report each, and blame one that does not wait, or differs."""
        beats = {rank: read_beat(store, rank) for rank in range(self._world_size)}
        for rank, beat in beats.items():
            if beat is None:
                return Failure(
                    rank=rank, step=0, phase=SET_UP, error=f"it has not reported within {elapsed_s:.0f} s"
                )
        known = {rank: beat for rank, beat in beats.items() if beat is not None}
        places = Counter((beat.step, beat.phase, beat.where) for beat in known.values())
        suspects = [r for r, beat in known.items() if not beat.waiting]
        rank = min(
            suspects or known,
            key=lambda r: (places[known[r].step, known[r].phase, known[r].where], known[r].step),
        )
        why = "this one does not wait for another" if suspects else "this one differs from the others"
        return Failure(
            rank=rank,
            step=known[rank].step,
            phase=known[rank].phase,
            exchange=known[rank].exchange,
            error=f"no rank has made progress for {elapsed_s:.0f} s, and {why} ({_doing(known)})",
            unreachable=True,
        )


def _doing(beats: Mapping[int, Heartbeat]) -> str:
    """What every rank does; ranks that do the same together."""
    groups: dict[str, list[int]] = {}
    for rank, beat in beats.items():
        what = ", ".join(filter(None, (f"step {beat.step}", beat.phase, beat.exchange)))
        doing = f"{what}, {'waiting ' if beat.waiting else ''}in {beat.where}"
        groups.setdefault(doing, []).append(rank)
    return "; ".join(
        f"rank{'s' if len(ranks) > 1 else ''} {ranges(ranks)}: {what}" for what, ranks in groups.items()
    )


def _main_thread_position() -> str:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "?"
    return f"{frame.f_code.co_name} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"


def read_beat(store: dist.Store, rank: int) -> Heartbeat | None:
    """The last heartbeat of a rank; None before its first."""
    key = beat_key(rank)
    return Heartbeat(**json.loads(store.get(key))) if store.check([key]) else None


def beat_key(rank: int) -> str:
    """The store's key of a rank's heartbeat."""
    return f"beat/{rank}"


def is_alive(beat: Heartbeat) -> bool:
    """Whether the process of a heartbeat still runs on this host; a zombie does not."""
    try:
        process = psutil.Process(beat.pid)
        return process.create_time() == beat.started and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill_silent_rank(connect: Callable[[], dist.Store], rank: int) -> None:
    """Kill the process of a silent rank on this host; torchrun would wait 30 s before it did so."""
    try:
        beat = read_beat(connect(), rank)
    except (RuntimeError, dist.DistError):
        return
    if beat is not None and beat.host == socket.gethostname() and is_alive(beat):
        os.kill(beat.pid, signal.SIGKILL)
