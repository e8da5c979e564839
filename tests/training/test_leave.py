"""The end of a good run: every rank ends with status 0, regardless of the timing of its peers and threads."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_lightseq.training.job.leave import leave_store, wait_until

PREAMBLE = """
import atexit, sys
from megatron_lightseq.training.job.exit import CleanExit
end = CleanExit() if "clean" in sys.argv else None
"""

ABORTS = """
import ctypes, datetime, threading, time
import torch.distributed as dist

store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
wait = lambda: store.wait(["nothing"], datetime.timedelta(seconds=2))
threading.Thread(target=wait, daemon=True).start()
time.sleep(0.2)  # the thread is inside the store's call
libc = ctypes.CDLL(None)  # it returns from the call during process exit, which is delayed here
libc.__cxa_atexit(ctypes.cast(libc.pause, ctypes.c_void_p), None, None)
if end is not None:
    end.status = 0
"""


def ran(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PREAMBLE + script, *arguments], capture_output=True, text=True, timeout=100
    )


def test_a_thread_that_returns_from_the_store_does_not_abort_a_good_run() -> None:
    """Without the clean exit the same program aborts, as may any program that has used torch.distributed."""
    aborted = ran(ABORTS)
    assert aborted.returncode == -6, aborted.stderr
    assert "terminate called without an active exception" in aborted.stderr
    clean = ran(ABORTS, "clean")
    assert clean.returncode == 0, clean.stderr


def test_what_runs_at_exit_still_runs() -> None:
    script = """
import threading, time, torch
atexit.register(print, "registered")
threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
print("run", end=" ")
end.status = 0
"""
    done = ran(script, "clean")
    assert (done.returncode, done.stdout.split()) == (0, ["run", "thread", "registered"])


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("import torch; end.status = 3; sys.exit(3)", 3),
        ("import torch; raise ValueError", 1),
        ("import torch; end.status = 0; sys.stdout.close()", 0),
        ("end.status = 0", 0),
    ],
)
def test_other_ends_take_the_usual_way(script: str, status: int) -> None:
    assert ran(script, "clean").returncode == status


def test_the_rank_that_holds_the_store_leaves_last() -> None:
    server = dist.TCPStore("127.0.0.1", 0, None, True, timeout=timedelta(seconds=5), wait_for_workers=False)
    left: list[int] = []

    def leave(rank: int, after_s: float) -> None:
        client = dist.TCPStore("127.0.0.1", server.port, None, False, timeout=timedelta(seconds=5))
        time.sleep(after_s)
        leave_store(client, rank=rank, world_size=3, timeout_s=60.0)
        left.append(rank)

    threads = [
        threading.Thread(target=leave, args=(rank, after_s)) for rank, after_s in enumerate((0, 0.6, 0.3))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert left == [2, 1, 0]


def test_a_rank_that_never_leaves_is_not_waited_for_in_vain() -> None:
    store = dist.TCPStore("127.0.0.1", 0, None, True, timeout=timedelta(seconds=5), wait_for_workers=False)
    began = time.monotonic()
    leave_store(store, rank=0, world_size=2, timeout_s=0.3)
    assert 0.3 <= time.monotonic() - began < 5.0
    assert not wait_until(lambda: False, 0.1)
    assert wait_until(lambda: True, 0.0)
