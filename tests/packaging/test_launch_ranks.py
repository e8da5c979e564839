"""How runs end, with the real torchrun and ranks that do not import torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_lightseq.training.job import launcher
from megatron_lightseq.training.job.failure import Failure
from tests.packaging.fakes import ROOT

LAUNCHER = str(ROOT / "scripts" / "launch_ranks.py")
READY = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
rank = os.environ["RANK"]
def ready():
    (folder / f"part-{rank}").write_text(str(os.getpid()))
    os.rename(folder / f"part-{rank}", folder / f"ready-{rank}")
"""
SAVES_WHEN_ASKED = (
    READY
    + """
def save(*_):
    (folder / f"saved-{rank}").touch()
    sys.exit(0)
signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, save)
ready()
time.sleep(60)
"""
)
IS_DEAF = SAVES_WHEN_ASKED.replace("save)", "signal.SIG_IGN)")
FAILS_TO_SAVE = SAVES_WHEN_ASKED.replace("sys.exit(0)", "sys.exit(5 if rank == '1' else 0)")
KNOWS_NO_SIGNALS = READY + "ready()\ntime.sleep(60)\n"
OUTLIVES_NOBODY = (
    READY
    + """
from megatron_lightseq.training.job.launch import end_with_launcher
end_with_launcher()
ready()
time.sleep(60)
"""
)
ONE_FAILS = """
import os, sys, time
if os.environ["RANK"] != "1":
    time.sleep(60)
sys.exit(print("its own words") or 7)
"""
FAILS_AT_A_STEP = """
import os, pathlib, sys, time
import torch.distributed as dist
from megatron_lightseq.training.job.control_channel import ControlChannel
from megatron_lightseq.training.job.launch import Launch
launch = Launch.from_environment()
assert launch.store_host == -1
store, _, _ = next(dist.rendezvous("env://"))
def connect():
    client = dist.TCPStore(store.host, store.port, None, False, wait_for_workers=False)
    return dist.PrefixStore(launch.store_prefix, client)
(pathlib.Path(sys.argv[1]) / f"attempt-{launch.attempt}").touch()
channel = ControlChannel(connect, rank=launch.rank, world_size=2, store_host=launch.store_host)
channel.enter(FAILS_AT, "train")
channel.start()
if launch.rank == 0:
    time.sleep(60)
with channel.guard():
    raise ValueError("the disk is gone")
"""


def start(folder: Path, program: str, *options: str, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    script = folder / "rank.py"
    script.write_text(program)
    launcher = [sys.executable, LAUNCHER, "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*before, *launcher, *options, str(script), str(folder)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_until_ready(folder: Path) -> list[psutil.Process]:
    """The processes of the ranks."""
    deadline = time.monotonic() + 120
    while len(found := list(folder.glob("ready-*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [psutil.Process(int(file.read_text())) for file in found]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_stopped_run_ends_in_order(tmp_path: Path, number: signal.Signals) -> None:
    run = start(tmp_path, SAVES_WHEN_ASKED)
    wait_until_ready(tmp_path)
    run.send_signal(number)
    printed, _ = run.communicate(timeout=120)
    assert run.returncode == 0, printed
    assert "Traceback" not in printed
    assert len(list(tmp_path.glob("saved-*"))) == 2


def test_a_closed_terminal_does_not_stop_a_run_under_nohup(tmp_path: Path) -> None:
    run = start(tmp_path, SAVES_WHEN_ASKED, before=("nohup",))
    wait_until_ready(tmp_path)
    run.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert run.poll() is None
    assert not list(tmp_path.glob("saved-*"))
    run.send_signal(signal.SIGTERM)
    printed, _ = run.communicate(timeout=120)
    assert (run.returncode, len(list(tmp_path.glob("saved-*")))) == (0, 2), printed


def test_ranks_that_had_to_be_killed_are_reported(tmp_path: Path) -> None:
    run = start(tmp_path, IS_DEAF, "--shutdown-timeout", "1")
    wait_until_ready(tmp_path)
    run.send_signal(signal.SIGTERM)
    printed, _ = run.communicate(timeout=120)
    assert run.returncode == 128 + signal.SIGTERM, printed
    assert "2 rank(s) did not end in time after SIGTERM and were killed" in printed


@pytest.mark.parametrize(
    ("program", "status", "words"),
    [(FAILS_TO_SAVE, 5, "rank 1 ended with exit code 5"), (KNOWS_NO_SIGNALS, 143, "ended with signal 15")],
)
def test_a_stop_without_a_save_is_no_success(tmp_path: Path, program: str, status: int, words: str) -> None:
    run = start(tmp_path, program)
    wait_until_ready(tmp_path)
    run.send_signal(signal.SIGTERM)
    printed, _ = run.communicate(timeout=120)
    assert run.returncode == status, printed
    assert words in printed


def test_ranks_do_not_outlive_their_launcher(tmp_path: Path) -> None:
    run = start(tmp_path, OUTLIVES_NOBODY)
    ranks = wait_until_ready(tmp_path)
    run.kill()
    run.wait()
    _, alive = psutil.wait_procs(ranks, timeout=30)
    assert not alive


def test_a_failed_rank_is_named_after_its_own_messages(tmp_path: Path) -> None:
    run = start(tmp_path, ONE_FAILS)
    printed, _ = run.communicate(timeout=120)
    assert run.returncode == 7, printed
    assert "Traceback" not in printed
    assert "its own words" in printed
    assert printed.rstrip().endswith(
        "[lightseq] error: rank 1 failed first, with exit code 7; see its messages above"
    )


def test_a_loop_of_crashes_ends_and_its_cause_is_the_last_line(tmp_path: Path) -> None:
    run = start(tmp_path, FAILS_AT_A_STEP.replace("FAILS_AT", "4"), "--max-restarts", "9")
    printed, _ = run.communicate(timeout=300)
    assert run.returncode == 1, printed
    assert len(list(tmp_path.glob("attempt-*"))) == 3
    assert "3 attempts have failed without getting beyond step 4; 7 restart(s) were left" in printed, printed
    last = "[lightseq] error: rank 1 failed at step 4 (train): ValueError: the disk is gone; exit code 1"
    assert printed.rstrip().splitlines()[-1] == last


def test_the_seams_of_torchrun_are_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launcher.missing_seams() == []
    monkeypatch.setattr(launcher.LocalElasticAgent, "_shutdown", lambda self: None)
    monkeypatch.delattr(launcher.rendezvous, "RendezvousInfo")
    missing = ["LocalElasticAgent._shutdown(death_sig)", "RendezvousInfo"]
    assert launcher.missing_seams() == missing
    assert launcher.main([]) == 1
    printed = capsys.readouterr().err
    assert f"lacks {', '.join(missing)}, which" in printed
    assert "start the ranks with torchrun itself" in printed


def test_a_culprit_that_ends_after_its_victims_is_still_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun stops it once a victim has ended, and knows of no other failure."""
    said: list[str] = []
    failure = Failure(rank=1, step=4, phase="train", error="ValueError: x")
    monkeypatch.setattr(launcher, "_say", said.append)
    monkeypatch.setattr(launcher._Agent, "last", SimpleNamespace(failure=failure))
    for statuses in ({0: 3}, {0: 3, 1: -signal.SIGTERM}):
        failures = {rank: _ended(rank, status) for rank, status in statuses.items()}
        assert launcher._failed(ChildFailedError("run", failures)) == 1
    failures = {0: _ended(0, 3), 1: _ended(1, -signal.SIGKILL)}
    assert launcher._failed(ChildFailedError("run", failures)) == 128 + signal.SIGKILL
    cause = "error: rank 1 failed at step 4 (train): ValueError: x"
    assert said == [f"{cause}; exit code 1", f"{cause}; exit code 1", f"{cause}; signal 9"]


def _ended(rank: int, status: int) -> ProcessFailure:
    return ProcessFailure(local_rank=rank, pid=1, exitcode=status, error_file="")
