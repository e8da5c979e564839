from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from megatron_lightseq.training.job.control_channel import ControlChannel
from megatron_lightseq.training.job.failure import (
    EXIT_PEER_FAILED,
    SET_UP,
    TRAIN,
    Failure,
    FaultLimits,
    is_communication_error,
    publish,
)
from megatron_lightseq.training.job.heartbeat import Heartbeat, Watch, beat_key, is_alive, read_beat
from megatron_lightseq.training.job.launch import LAUNCHER
from megatron_lightseq.training.job.leave import wait_until
from megatron_lightseq.training.job.signals import stop_on_signals
from tests.training.faulty_rank import LIMITS

REPOSITORY = Path(__file__).parents[2]
WORLD_SIZE = 3
WALL_LIMIT_S = 90.0


def run_faulty(
    fault: str, culprit: int, survivors: tuple[int, ...] = (0, 1, 2)
) -> tuple[dict[int, int], dict[int, str], float]:
    """Exit codes and stderr by rank, and the seconds from the fault until the survivors ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = {}
    for rank in range(WORLD_SIZE):
        environment = {"RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE), "MASTER_ADDR": "127.0.0.1"}
        environment |= {"MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        processes[rank] = subprocess.Popen(
            [sys.executable, "-m", "tests.training.faulty_rank", fault, str(culprit)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, **environment, "PYTHONPATH": str(REPOSITORY)},
        )
    outputs = {}
    try:
        for rank in survivors:
            outputs[rank] = processes[rank].communicate(timeout=WALL_LIMIT_S)
        ended = time.time()
        for rank in {*processes} - {*survivors}:
            processes[rank].kill()
            outputs[rank] = processes[rank].communicate()
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    began = float(re.findall(r"fault at ([\d.]+)", outputs[culprit][0])[0])
    codes = {rank: process.returncode for rank, process in processes.items()}
    return codes, {rank: output[1] for rank, output in outputs.items()}, ended - began


def test_a_rank_that_vanishes_with_the_store_is_named_by_the_others() -> None:
    """Rank 0 hosts the store, as under srun, so the others lose the store before they miss the heartbeat."""
    codes, errors, seconds = run_faulty("exit", 0)
    for rank in (1, 2):
        assert codes[rank] == EXIT_PEER_FAILED
        gone = r"(its process \d+|the process that holds the job's store) is gone"
        assert re.search(rf"stopped because rank 0 failed at step \d+ \(train\): {gone}", errors[rank])
    assert seconds < 15.0


def test_a_store_that_dies_with_its_launcher_is_not_blamed_on_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[Failure] = []
    monkeypatch.setattr(ControlChannel, "_leave", lambda channel: left.append(channel._failure))

    def connect() -> dist.Store:
        raise dist.DistNetworkError("connection refused")

    channel = ControlChannel(
        connect, rank=0, world_size=2, limits=replace(LIMITS, setup_s=0.1), store_host=LAUNCHER
    )
    channel.start()
    assert wait_until(lambda: bool(left), 30.0)
    assert str(left[0]).startswith(
        "the launcher failed before the first step (set-up): the process that holds"
    )


def test_a_stopped_process_that_holds_the_store_is_named() -> None:
    """The store is no longer available, so the reason cannot be read from it either."""
    codes, errors, seconds = run_faulty("stop", 0, survivors=(1, 2))
    assert (codes[1], codes[2]) == (EXIT_PEER_FAILED, EXIT_PEER_FAILED)
    for rank in (1, 2):
        expected = "stopped because rank 0 failed at step"
        assert expected in errors[rank]
        assert "the process that holds the job's store has not answered" in errors[rank]
    assert seconds < LIMITS.silence_s + LIMITS.suspect_silence_s + 20.0


def test_a_good_run_ends_quietly() -> None:
    codes, errors, _ = run_faulty("nothing", 0)
    assert codes == {0: 0, 1: 0, 2: 0}
    assert not any("stopped" in text for text in errors.values())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_looks_up_late_ends_well(rank: int) -> None:
    """Rank 0's process hosts the store, as under srun, so it must not exit while another rank still uses it."""
    codes, errors, _ = run_faulty("late", rank)
    assert codes == {0: 0, 1: 0, 2: 0}, errors


# ---- parts ----------------------------------------------------------------------------------------------------


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, None, True, timeout=timedelta(seconds=5), wait_for_workers=False)


def beat(rank: int, **changes: object) -> Heartbeat:
    base = Heartbeat(
        count=1,
        step=5,
        phase=TRAIN,
        phase_s=1.0,
        exchange="",
        waiting=True,
        board="",
        where="all_reduce",
        host="elsewhere",
        pid=1,
        started=0.0,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def put(store: dist.Store, rank: int, heartbeat: Heartbeat) -> None:
    import json

    store.set(beat_key(rank), json.dumps(asdict(heartbeat)))


def watch(limits: FaultLimits, rank: int = 0, world_size: int = 3) -> Watch:
    return Watch(rank=rank, world_size=world_size, limits=limits)


def test_the_first_failure_stays_on_record(store: dist.TCPStore) -> None:
    first = Failure(rank=2, step=17, phase=TRAIN, error="ValueError: x")
    assert publish(store, first) == first
    assert publish(store, replace(first, rank=1)) == first


def test_silence_is_judged_by_the_limits(store: dist.TCPStore) -> None:
    limits = FaultLimits(silence_s=0.3, suspect_silence_s=0.1)
    watching = watch(limits)
    assert watching.look(store, suspicious=False) is None, "a rank that has not begun is not silent"
    put(store, 1, beat(1))
    assert watching.look(store, suspicious=False) is None
    time.sleep(0.15)
    assert watching.look(store, suspicious=False) is None
    failure = watching.look(store, suspicious=True)
    assert failure is not None
    assert (failure.rank, failure.step, failure.unreachable) == (1, 5, True)
    put(store, 1, beat(1, count=2))
    assert watching.look(store, suspicious=True) is None, "a new heartbeat ends the silence"


def test_a_reused_process_id_is_another_process() -> None:
    own = os.getpid()
    started = psutil.Process().create_time()
    assert is_alive(beat(0, pid=own, started=started))
    assert not is_alive(beat(0, pid=own, started=started - 100))


def test_a_rank_that_never_came_is_named(store: dist.TCPStore) -> None:
    put(store, 0, beat(0))
    put(store, 2, beat(2))
    failure = watch(FaultLimits()).stuck(store, 600.0)
    assert str(failure) == "rank 1 failed before the first step (set-up): it has not reported within 600 s"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[pair.cc:547] Connection closed by peer [127.0.0.1]:4711"), True),
        (
            RuntimeError(
                "[/gloo/transport/tcp/unbound_buffer.cc:84] Timed out waiting 5000ms for recv operation"
            ),
            True,
        ),
        (dist.DistBackendError("NCCL error"), True),
        (ConnectionResetError("reset"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("connection"), False),
        (KeyError("x"), False),
    ],
)
def test_which_errors_may_be_echoes(error: Exception, expected: bool) -> None:
    assert is_communication_error(error) == expected


def test_an_error_of_its_own_passes_through_a_channel_of_one_rank() -> None:
    channel = ControlChannel(lambda: pytest.fail("a world of one needs no store"), rank=0, world_size=1)
    channel.start()
    with pytest.raises(ZeroDivisionError), channel.guard():
        raise ZeroDivisionError
    channel.finish()
    channel.leave()


def test_a_long_step_is_no_hang_until_it_is_ten_times_the_longest() -> None:
    channel = ControlChannel(lambda: None, rank=0, world_size=2, limits=FaultLimits(step_floor_s=0.0))  # type: ignore[arg-type, return-value]
    asked: list[float] = []

    class Asked:
        def stuck(self, _store: object, elapsed: float) -> Failure:
            asked.append(elapsed)
            return Failure(rank=0, step=0, phase=TRAIN, error="")

    def overdue() -> bool:
        return channel._overdue(Asked(), None) is not None  # type: ignore[arg-type]

    channel.enter(1, TRAIN)
    time.sleep(0.2)
    channel.enter(2, TRAIN)  # the first step does not count, because it plans and allocates
    assert not overdue()
    time.sleep(0.02)
    channel.enter(3, TRAIN)
    time.sleep(0.1)
    assert not overdue(), "5 times the longest step"
    time.sleep(0.3)
    assert overdue(), "20 times the longest step"
    assert asked


def test_a_rank_is_known_before_its_first_step(store: dist.TCPStore) -> None:
    """With short steps, a rank that dies in its first half second must be named too."""

    def connect() -> dist.Store:
        return dist.TCPStore("127.0.0.1", store.port, None, False, timeout=timedelta(seconds=5))

    channel = ControlChannel(connect, rank=1, world_size=2, limits=FaultLimits(beat_s=600.0))
    channel.start()
    known = read_beat(store, 1)
    channel.enter(1, TRAIN)

    def trains() -> bool:
        beat = read_beat(store, 1)
        return beat is not None and (beat.step, beat.phase) == (1, TRAIN)

    wait_until(trains, 30.0)
    told = trains()
    channel._stop_thread()
    assert known is not None
    assert (known.step, known.phase, known.pid) == (0, SET_UP, os.getpid())
    assert told, "the next heartbeat was due in ten minutes, but a new phase must be reported immediately"


# ---- signals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_one_signal_is_a_request(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.signal == number
    assert signal.getsignal(number) == before


def test_a_second_signal_ends_the_process_at_once() -> None:
    child = os.fork()
    if child == 0:
        with stop_on_signals():
            os.kill(os.getpid(), signal.SIGINT)
            try:
                time.sleep(1.2)
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            finally:
                os._exit(99)  # clean-up must not run: it could wait for other ranks
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGTERM


def test_signals_that_come_together_are_one_request() -> None:
    """A scheduler may signal the ranks and their launcher, which signals the ranks as well."""
    with stop_on_signals() as stop:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert stop.signal == signal.SIGUSR1


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_does_not_change_how_a_leaving_process_ends() -> None:
    child = os.fork()
    if child == 0:
        with stop_on_signals() as stop:
            stop.leave()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        os._exit(EXIT_PEER_FAILED)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == EXIT_PEER_FAILED
