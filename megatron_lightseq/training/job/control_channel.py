"""Who failed first, where, and why: a control channel in addition to the data channel.

A broken collective says "connection reset by peer" and names a socket. Each rank therefore runs a daemon thread that
uses the job's TCPStore: it writes a heartbeat (step and phase of the main thread), watches the next rank's heartbeat,
and reads the record of the first failure.

* A rank that raises records rank, step, phase and error text before it exits; the others stop with a
  :class:`~megatron_lightseq.errors.PeerFailureError` that quotes it, in place of socket errors.
* A rank that died or stopped answering is reported by the rank that watches it.
* Ranks that all answer but make no progress (a deadlock) are reported with a table of what each is doing.

If the main thread cannot be reached because it waits inside a collective, its daemon thread ends the process. Nothing
here touches the data collectives, and each main-thread call costs an attribute store.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch.distributed as dist

from megatron_lightseq.attention.stats import Place
from megatron_lightseq.errors import PeerFailureError
from megatron_lightseq.training.job.board import Board, Whereabouts, exchange_in_words
from megatron_lightseq.training.job.failure import (
    EXIT_PEER_FAILED,
    SET_UP,
    TRAIN,
    Failure,
    FaultLimits,
    is_communication_error,
    publish,
)
from megatron_lightseq.training.job.heartbeat import Watch, kill_silent_rank
from megatron_lightseq.training.job.leave import leave_store, wait_until
from megatron_lightseq.training.job.rank_log import dump_stacks, note
from megatron_lightseq.training.job.waits import Waits

_SEEN = "failure_seen"
_DONE = "done"


class ControlChannel:
    """One rank's end of the control channel.

    ``connect`` opens a new connection to the job's store. The daemon thread has its own, because a store's client
    serves one call at a time, and the main thread may block in one. ``store_host`` is the rank whose process holds the
    store, or :data:`~megatron_lightseq.training.job.launch.LAUNCHER`. ``waits`` tells whether the main thread waits.
    """

    def __init__(
        self,
        connect: Callable[[], dist.Store],
        *,
        rank: int,
        world_size: int,
        limits: FaultLimits | None = None,
        store_host: int = 0,
        waits: Waits | None = None,
    ) -> None:
        self._rank = rank
        self._world_size = world_size
        self._limits = limits or FaultLimits()
        self._store_host = store_host
        self._waits = waits or Waits()
        self._place = Place()
        self._board = Board()
        self._connect = connect
        self._step = 0
        self._phase = SET_UP
        self._since = time.monotonic()
        self._longest_step_s = 0.0
        self._suspicious = threading.Event()
        self._closing = threading.Event()
        self._news = threading.Event()
        self._introduced = threading.Event()
        self._over = threading.Event()
        self._failure: Failure | None = None
        self._known = threading.Condition()
        self._thread: threading.Thread | None = None
        self._last_round = time.monotonic()

    def start(self) -> None:
        """Start heartbeats and watching; a world of one rank needs neither.

        Returns after the first heartbeat: a rank that dies before it would be missed, but not named.
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
        self._post()
        if news:
            note(f"step {step}: {phase}")
            self._news.set()  # so that a rank that dies soon is reported with the right phase

    def follow(self, place: Place) -> None:
        """Tell others where the main thread is in its attention, too."""
        self._place = place
        place.changed = self._post

    def _post(self) -> None:
        place = self._place
        self._board.write(self._step, self._phase, place.direction, place.step, place.num_steps, place.layer)

    def _here(self) -> Whereabouts:
        place = self._place
        exchange = exchange_in_words(place.direction, place.step, place.num_steps, place.layer)
        return Whereabouts(step=self._step, phase=self._phase, exchange=exchange)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Report an error that leaves the block, or replace it with the failure of the rank that caused it.

        Raises PeerFailureError if another rank failed first; this rank's own error passes through.
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

    def finish(self) -> None:
        """Wait until every rank has finished its work.

        Heartbeats and watching continue until then: a rank that left early would look dead.
        """
        if self._thread is None:
            return
        try:
            store = self._connect()
            store.add(_DONE, 1)
            wait_until(lambda: self._all_finished(store), self._limits.setup_s)
        except (RuntimeError, dist.DistError):
            if not self._over.is_set():  # else the store's host has left after a good run
                raise

    def leave(self) -> None:
        """Stop the heartbeats and the use of the store; the rank that holds the store returns last."""
        if self._thread is None:
            return
        self._stop_thread()
        try:
            store = self._connect()
        except (RuntimeError, dist.DistError):
            return  # the store is gone: all others have left
        leave_store(store, rank=self._rank, world_size=self._world_size, store_host=self._store_host)

    # ---- main thread ------------------------------------------------------------------------------------------

    def _known_failure(self) -> Failure | None:
        with self._known:
            return self._failure

    def _blame(self, error: Exception) -> Failure | None:
        """A collective failed: wait, within limits, until the channel knows which rank caused it."""
        self._suspicious.set()
        with self._known:
            self._known.wait_for(lambda: self._failure is not None, timeout=self._limits.blame_s)
            if self._failure is not None:
                return self._failure
        if self._rank == self._store_host:
            return None
        try:
            self._connect()
        except (RuntimeError, dist.DistError):
            return self._host_gone(error)
        return None

    def _report(self, error: Exception) -> None:
        """Record this rank's own error; the first record of a run stays."""
        if self._thread is None:
            return
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        failure = Failure(rank=self._rank, **asdict(self._here()), error=f"{type(error).__name__}: {text}")
        self._close_thread()
        try:
            publish(self._connect(), failure)
        except (RuntimeError, dist.DistError):
            return  # the store is gone, so no rank can read a report
        finally:
            self._stop_thread()
        self._let_others_read()

    def _let_others_read(self) -> None:
        """On the rank that holds the store, wait until the others have read the record: it dies with this process."""
        if self._rank != self._store_host:
            return
        try:
            store = self._connect()
            wait_until(lambda: store.add(_SEEN, 0) >= self._world_size - 1, self._limits.suspect_silence_s)
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
            rank=self._store_host,
            step=self._step,
            phase=self._phase,
            error=f"the process that holds the job's store is gone ({type(error).__name__})",
        )

    # ---- daemon thread ----------------------------------------------------------------------------------------

    def _serve(self) -> None:
        watch = Watch(rank=self._rank, world_size=self._world_size, limits=self._limits)
        try:
            store = self._connect()
            self._beat(watch, store)
            self._introduced.set()
            while not self._closed_before_beat():
                self._beat(watch, store)
                failure = watch.look(store, suspicious=self._suspicious.is_set()) or self._overdue(
                    watch, store
                )
                if self._all_finished(store):
                    return  # a rank that is gone has left: this one may be late to see that all have finished
                if failure is not None:
                    self._learn(publish(store, failure))
                    if self._failure is not None and self._failure.rank != self._rank:
                        store.add(_SEEN, 1)
                    return self._leave()
        except (RuntimeError, dist.DistError) as error:
            if not self._closing.is_set() and not self._over.is_set():
                self._learn(self._host_gone(error))
                self._leave()

    def _all_finished(self, store: dist.Store) -> bool:
        """Whether every rank has finished its work; from then on a missing process is no failure."""
        if not self._over.is_set() and store.add(_DONE, 0) >= self._world_size:
            self._over.set()
        return self._over.is_set()

    def _closed_before_beat(self) -> bool:
        """Wait until the next heartbeat is due: after a while, or immediately when the phase changes."""
        self._news.wait(self._limits.beat_s)
        self._news.clear()
        return self._closing.is_set()

    def _beat(self, watch: Watch, store: dist.Store) -> None:
        self._last_round = time.monotonic()
        elapsed, waiting = time.monotonic() - self._since, self._waits.since is not None
        watch.beat(store, self._here(), elapsed, waiting=waiting, board=self._board.path)

    def _supervise(self) -> None:
        """Notice a store that does not answer and blocks the other thread: its process is stopped or unreachable."""
        while not self._closing.wait(self._limits.beat_s) and not self._over.is_set():
            silent_s = time.monotonic() - self._last_round
            if self._failure is None and silent_s > self._limits.silence_s + self._limits.suspect_silence_s:
                error = f"the process that holds the job's store has not answered for {silent_s:.0f} s"
                self._learn(Failure(rank=self._store_host, step=self._step, phase=self._phase, error=error))
                return self._leave()

    def _overdue(self, watch: Watch, store: dist.Store) -> Failure | None:
        """A hang, if this rank's main thread has been in its phase for longer than the phase may take."""
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
        """End the process if the main thread does not leave by itself because it waits inside a collective."""
        if self._closing.wait(self._limits.grace_s) or self._suspicious.is_set():
            return
        failure = self._failure
        assert failure is not None
        own = failure.rank == self._rank
        dump_stacks(f"stopped because {failure}")
        sys.stderr.write(f"rank {self._rank}: stopped because {failure}\n")
        sys.stderr.flush()
        self._let_others_read()
        if failure.unreachable and not own:
            kill_silent_rank(self._connect, failure.rank)
        os._exit(1 if own else EXIT_PEER_FAILED)
