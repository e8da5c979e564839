"""Who failed first, where, and why: a control channel beside the data channel.

A broken collective says "connection reset by peer" and names a socket. Each rank therefore keeps a daemon
thread on the job's TCPStore that writes a heartbeat (step and phase of its main thread), watches the next
rank's heartbeat, and reads the one record of the first failure:

* a rank that raises writes rank, step, phase and error text before it exits; the others stop with a
  :class:`~megatron_lightseq.errors.PeerFailureError` that says so, in place of socket noise;
* a rank that died, or stopped answering, is reported by the rank that watches it;
* ranks that all answer but do not get on (a deadlock) are reported with a table of what each is doing.

A main thread that cannot be reached, because it waits inside a collective, is ended by its own daemon thread.
Nothing here touches the data collectives, and each main-thread call costs an attribute store.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import psutil
import torch.distributed as dist

from megatron_lightseq.errors import PeerFailureError

SET_UP, TRAIN, EVALUATE, SAVE, FINISH = "set-up", "train", "evaluate", "save", "finish"
"""Phases a rank can be in; :data:`TRAIN` is one optimizer step and has a limit that adapts to their length."""

EXIT_PEER_FAILED = 3
"""Exit code of a rank that stopped because another one failed; the failing rank itself exits with 1."""

# Rank 0's process holds the store, or torchrun's agent beside it does.
_STORE_HOST = 0

_FAILURE = "failure"
_SEEN = "failure_seen"
_DONE = "done"


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultLimits:
    """How long to wait before a rank is given up, all in seconds."""

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
    """A step is never called hung before this."""
    step_factor: float = 10.0
    """A step that takes this many times the longest one so far is called hung."""
    setup_s: float = 600.0
    """Limit for set-up, the first step, evaluation and saving."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """The record of the first failure of a run."""

    rank: int
    step: int
    phase: str
    error: str
    unreachable: bool = False
    """The rank still has a process, which no longer answers or no longer gets on."""

    def __str__(self) -> str:
        where = f"at step {self.step}" if self.step > 0 else "before the first step"
        return f"rank {self.rank} failed {where} ({self.phase}): {self.error}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """What a rank says about itself every half second."""

    count: int
    step: int
    phase: str
    phase_s: float
    """Seconds the main thread has spent in this phase."""
    where: str
    """The Python function that the main thread is in."""
    host: str
    pid: int
    started: float
    """Creation time of the process, which together with ``pid`` names it for good."""


class ControlChannel:
    """One rank's end of the control channel.

    ``connect`` opens a new connection to the job's store: the daemon thread has one of its own, because a
    store's client serves one call at a time and a main thread may block in it.
    """

    def __init__(
        self,
        connect: Callable[[], dist.Store],
        *,
        rank: int,
        world_size: int,
        limits: FaultLimits | None = None,
    ) -> None:
        self._rank = rank
        self._world_size = world_size
        self._limits = limits or FaultLimits()
        self._connect = connect
        self._step = 0
        self._phase = SET_UP
        self._since = time.monotonic()
        self._longest_step_s = 0.0
        self._suspicious = threading.Event()
        self._closing = threading.Event()
        self._news = threading.Event()
        self._introduced = threading.Event()
        self._failure: Failure | None = None
        self._known = threading.Condition()
        self._thread: threading.Thread | None = None
        self._last_round = time.monotonic()

    def start(self) -> None:
        """Begin to beat and to watch; a world of one rank has nobody to tell.

        Returns after the first heartbeat: a rank that died before it would be missed, but not named.
        """
        if self._world_size == 1:
            return
        self._thread = threading.Thread(target=self._serve, name="mls-control", daemon=True)
        self._thread.start()
        threading.Thread(target=self._supervise, name="mls-control-supervisor", daemon=True).start()
        self._introduced.wait(self._limits.setup_s)

    def enter(self, step: int, phase: str) -> None:
        """The main thread begins ``phase`` of ``step`` (steps count from 1; 0 is before the first)."""
        now = time.monotonic()
        if self._phase == TRAIN and self._step > 1:
            self._longest_step_s = max(self._longest_step_s, now - self._since)
        news = phase != self._phase
        self._step, self._phase, self._since = step, phase, now
        if news:
            self._news.set()  # a rank that dies soon is named with the phase that it was in

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Report an error that leaves the block, or replace it by the other rank's that caused it.

        Raises PeerFailureError when another rank failed first; an error of this rank's own passes through.
        """
        try:
            yield
        except Exception as error:
            failure = self._blame(error) if is_communication_error(error) else self._known_failure()
            if failure is not None and failure.rank != self._rank:
                self._let_others_read()
                raise PeerFailureError(f"stopped because {failure}") from error
            self._report(error)
            raise

    def close(self) -> None:
        """Leave the channel at the end of a good run, when every rank has arrived here.

        Until then heartbeats and watching go on: a rank that left early would look dead, and rank 0 holds
        the store.
        """
        if self._thread is None:
            return
        store = self._connect()
        store.add(_DONE, 1)
        _wait_until(lambda: store.add(_DONE, 0) >= self._world_size, self._limits.setup_s)
        self._stop_thread()

    # ---- main thread ------------------------------------------------------------------------------------------

    def _known_failure(self) -> Failure | None:
        with self._known:
            return self._failure

    def _blame(self, error: Exception) -> Failure | None:
        """A collective broke: wait until the channel knows which rank caused it, within bounds."""
        self._suspicious.set()
        with self._known:
            self._known.wait_for(lambda: self._failure is not None, timeout=self._limits.blame_s)
            if self._failure is not None:
                return self._failure
        if self._rank == _STORE_HOST:
            return None
        try:
            self._connect()
        except (RuntimeError, dist.DistError):
            return self._host_gone(error)
        return None

    def _report(self, error: Exception) -> None:
        """Publish this rank's own error; the first report of a run stays."""
        if self._thread is None:
            return
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        failure = Failure(
            rank=self._rank, step=self._step, phase=self._phase, error=f"{type(error).__name__}: {text}"
        )
        self._close_thread()
        try:
            _publish(self._connect(), failure)
        except (RuntimeError, dist.DistError):
            return  # the store is gone, and with it everyone who could be told
        finally:
            self._stop_thread()
        self._let_others_read()

    def _let_others_read(self) -> None:
        """The record of a failure dies with the process that holds the store: wait until it is known."""
        if self._rank != _STORE_HOST:
            return
        try:
            store = self._connect()
            _wait_until(lambda: store.add(_SEEN, 0) >= self._world_size - 1, self._limits.suspect_silence_s)
        except (RuntimeError, dist.DistError):
            return

    def _close_thread(self) -> None:
        self._closing.set()
        self._news.set()

    def _stop_thread(self) -> None:
        self._close_thread()
        if self._thread is not None:
            self._thread.join(timeout=self._limits.grace_s)
            self._thread = None

    def _host_gone(self, error: Exception) -> Failure:
        return Failure(
            rank=_STORE_HOST,
            step=self._step,
            phase=self._phase,
            error=f"the process that holds the job's store is gone ({type(error).__name__})",
        )

    # ---- daemon thread ----------------------------------------------------------------------------------------

    def _serve(self) -> None:
        watch = _Watch(rank=self._rank, world_size=self._world_size, limits=self._limits)
        try:
            store = self._connect()
            self._beat(watch, store)
            self._introduced.set()
            while not self._closed_before_beat():
                self._beat(watch, store)
                failure = watch.look(store, suspicious=self._suspicious.is_set()) or self._overdue(
                    watch, store
                )
                if failure is not None:
                    self._learn(_publish(store, failure))
                    if self._failure is not None and self._failure.rank != self._rank:
                        store.add(_SEEN, 1)
                    return self._leave()
        except (RuntimeError, dist.DistError) as error:
            if not self._closing.is_set():
                self._learn(self._host_gone(error))
                self._leave()

    def _closed_before_beat(self) -> bool:
        """Wait until the next heartbeat is due: after a while, or at once when the phase changes."""
        self._news.wait(self._limits.beat_s)
        self._news.clear()
        return self._closing.is_set()

    def _beat(self, watch: _Watch, store: dist.Store) -> None:
        self._last_round = time.monotonic()
        watch.beat(store, self._step, self._phase, time.monotonic() - self._since)

    def _supervise(self) -> None:
        """A store that does not answer blocks the thread that asks it: its process is stopped or unreachable."""
        while not self._closing.wait(self._limits.beat_s):
            silent_s = time.monotonic() - self._last_round
            if self._failure is None and silent_s > self._limits.silence_s + self._limits.suspect_silence_s:
                error = f"the process that holds the job's store has not answered for {silent_s:.0f} s"
                self._learn(Failure(rank=_STORE_HOST, step=self._step, phase=self._phase, error=error))
                return self._leave()

    def _overdue(self, watch: _Watch, store: dist.Store) -> Failure | None:
        """A hang, if this rank's main thread has been in one phase for longer than the phase may take."""
        limits = self._limits
        elapsed = time.monotonic() - self._since
        limit = limits.setup_s
        if self._phase == TRAIN and self._step > 1 and self._longest_step_s > 0:
            limit = max(limits.step_floor_s, limits.step_factor * self._longest_step_s)
        return watch.stuck(store, elapsed) if elapsed > limit else None

    def _learn(self, failure: Failure) -> None:
        with self._known:
            self._failure = failure
            self._known.notify_all()

    def _leave(self) -> None:
        """End the process if the main thread does not leave by itself: it waits inside a collective."""
        if self._closing.wait(self._limits.grace_s) or self._suspicious.is_set():
            return
        failure = self._failure
        assert failure is not None
        own = failure.rank == self._rank
        sys.stderr.write(f"rank {self._rank}: stopped because {failure}\n")
        sys.stderr.flush()
        self._let_others_read()
        if failure.unreachable and not own:
            _put_down(self._connect, failure.rank)
        os._exit(1 if own else EXIT_PEER_FAILED)


class _Watch:
    """The daemon thread's view: its own heartbeat, and the age of the next rank's."""

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
        self._changed = time.monotonic()

    def beat(self, store: dist.Store, step: int, phase: str, phase_s: float) -> None:
        self._count += 1
        beat = Heartbeat(
            count=self._count,
            step=step,
            phase=phase,
            phase_s=round(phase_s, 1),
            where=_main_thread_position(),
            host=self._host,
            pid=self._pid,
            started=self._started,
        )
        store.set(_beat_key(self._rank), json.dumps(asdict(beat)))

    def look(self, store: dist.Store, *, suspicious: bool) -> Failure | None:
        """The failure that is on record, or the one that the next rank's silence amounts to."""
        if store.check([_FAILURE]):
            return Failure(**json.loads(store.get(_FAILURE)))
        beat = _read_beat(store, self._next)
        now = time.monotonic()
        if beat is not None and (self._last is None or beat.count != self._last.count):
            self._last, self._changed = beat, now
        if self._last is None:
            return None  # not started yet: the limit on set-up covers it
        return self._silence(self._last, now - self._changed, suspicious=suspicious)

    def _silence(self, beat: Heartbeat, silent_s: float, *, suspicious: bool) -> Failure | None:
        limit_s = self._limits.suspect_silence_s if suspicious else self._limits.silence_s
        gone = beat.host == self._host and silent_s > self._limits.beat_s and not _is_alive(beat)
        if gone:
            error = f"its process {beat.pid} is gone (killed?)"
        elif silent_s > limit_s:
            error = f"process {beat.pid} on {beat.host} has given no sign of life for {silent_s:.0f} s"
        else:
            return None
        return Failure(rank=self._next, step=beat.step, phase=beat.phase, error=error, unreachable=not gone)

    def stuck(self, store: dist.Store, elapsed_s: float) -> Failure:
        """Everyone answers and nobody gets on: a line on each rank, and the odd one out for the culprit."""
        beats = {rank: _read_beat(store, rank) for rank in range(self._world_size)}
        for rank, beat in beats.items():
            if beat is None:
                return Failure(
                    rank=rank, step=0, phase=SET_UP, error=f"it never reported in {elapsed_s:.0f} s"
                )
        known = {rank: beat for rank, beat in beats.items() if beat is not None}
        places = Counter((beat.step, beat.phase, beat.where) for beat in known.values())
        rank = min(
            known, key=lambda r: (places[known[r].step, known[r].phase, known[r].where], known[r].step)
        )
        doing = "; ".join(f"rank {r}: step {b.step}, {b.phase}, in {b.where}" for r, b in known.items())
        return Failure(
            rank=rank,
            step=known[rank].step,
            phase=known[rank].phase,
            error=f"no rank has got on for {elapsed_s:.0f} s, and this one differs from the others ({doing})",
            unreachable=True,
        )


def is_communication_error(error: BaseException) -> bool:
    """Whether an error may be the echo of another rank's failure: a broken or timed-out collective."""
    if isinstance(error, (dist.DistError, ConnectionError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    text = str(error).lower()
    return any(word in text for word in ("gloo", "nccl", "connection", "peer", "timed out", "socket"))


def _publish(store: dist.Store, failure: Failure) -> Failure:
    """Put a failure on record unless there is one; the one on record."""
    first = store.compare_set(_FAILURE, "", json.dumps(asdict(failure)))
    return Failure(**json.loads(first))


def _main_thread_position() -> str:
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "?"
    return f"{frame.f_code.co_name} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"


def _read_beat(store: dist.Store, rank: int) -> Heartbeat | None:
    key = _beat_key(rank)
    return Heartbeat(**json.loads(store.get(key))) if store.check([key]) else None


def _beat_key(rank: int) -> str:
    return f"beat/{rank}"


def _is_alive(beat: Heartbeat) -> bool:
    """Whether the process of a heartbeat still runs on this host; a zombie does not."""
    try:
        process = psutil.Process(beat.pid)
        return process.create_time() == beat.started and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _put_down(connect: Callable[[], dist.Store], rank: int) -> None:
    """Kill the process of a silent rank on this host: torchrun would wait 30 s for it before it did."""
    try:
        beat = _read_beat(connect(), rank)
    except (RuntimeError, dist.DistError):
        return
    if beat is not None and beat.host == socket.gethostname() and _is_alive(beat):
        os.kill(beat.pid, signal.SIGKILL)


def _wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
