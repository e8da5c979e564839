"""How runs end: with the real torchrun, and ranks that do not import torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.packaging.fakes import ROOT

LAUNCHER = str(ROOT / "scripts" / "launch_ranks.py")
SAVES_WHEN_ASKED = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def save(*_):
    (folder / f"saved-{os.environ['RANK']}").touch()
    sys.exit(0)
signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, save)
(folder / f"ready-{os.environ['RANK']}").touch()
time.sleep(60)
"""
IS_DEAF = SAVES_WHEN_ASKED.replace("save)", "signal.SIG_IGN)")
ONE_FAILS = """
import os, sys, time
if os.environ["RANK"] != "1":
    time.sleep(60)
sys.exit(print("its own words") or 7)
"""
LAST_WORDS = "[lightseq] error: rank 1 failed first, with exit code 7; see its messages above"


def start(folder: Path, program: str, *options: str) -> subprocess.Popen[str]:
    script = folder / "rank.py"
    script.write_text(program)
    command = [
        sys.executable,
        LAUNCHER,
        "--standalone",
        "--nproc-per-node",
        "2",
        *options,
        str(script),
        str(folder),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_until_ready(folder: Path) -> None:
    deadline = time.monotonic() + 120
    while len(list(folder.glob("ready-*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_stopped_run_ends_in_order(tmp_path: Path) -> None:
    run = start(tmp_path, SAVES_WHEN_ASKED)
    wait_until_ready(tmp_path)
    run.send_signal(signal.SIGINT)
    printed, _ = run.communicate(timeout=120)
    assert run.returncode == 0, printed
    assert "Traceback" not in printed
    assert len(list(tmp_path.glob("saved-*"))) == 2


def test_ranks_that_had_to_be_killed_are_reported(tmp_path: Path) -> None:
    run = start(tmp_path, IS_DEAF, "--shutdown-timeout", "1")
    wait_until_ready(tmp_path)
    run.send_signal(signal.SIGTERM)
    printed, _ = run.communicate(timeout=120)
    assert run.returncode == 128 + signal.SIGTERM, printed
    assert "2 rank(s) did not end in time after SIGTERM and were killed" in printed


def test_a_failed_rank_is_named_after_its_own_messages(tmp_path: Path) -> None:
    run = start(tmp_path, ONE_FAILS)
    printed, _ = run.communicate(timeout=120)
    assert run.returncode == 7, printed
    assert "Traceback" not in printed
    assert "its own words" in printed
    assert printed.rstrip().endswith(
        "[lightseq] error: rank 1 failed first, with exit code 7; see its messages above"
    )
