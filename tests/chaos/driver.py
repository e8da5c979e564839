"""Runs a plan of faults under the real launcher, and tells what became of each attempt."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from megatron_lightseq.training.job.rank_log import FOLDER_NAME
from tests.chaos.faults import VARIABLE, Fault, write_plan
from tests.training.launched import OUR_LAUNCHER, Launched, launch

PROGRAM = ("-m", "tests.chaos.rank")
WALL_LIMIT_S = 900.0
_NAMED = re.compile(
    r"(the launcher|rank \d+) failed (?:at step (\d+)|before the first step) \(([^)]*)\): (.*)"
)
_PROCESS = re.compile(r"process (\d+) on ")


@dataclass
class Seen:
    """One attempt."""

    fault: Fault | None
    fired: dict[str, Any] | None = None
    """When and where the fault has struck, as its rank recorded it; None if it has not."""
    rank: str = ""
    """Who was named: ``rank 1``; empty if nobody."""
    step: int = 0
    where: str = ""
    """Phase and exchange that were named."""
    error: str = ""
    named_s: float | None = None
    """From the fault until a rank knew."""
    ended_s: float | None = None
    """From the fault until all processes of the attempt were gone."""

    @property
    def names_the_rank(self) -> bool:
        """Whether the rank with the fault was named."""
        return self.fault is not None and self.rank == f"rank {self.fault.rank}"

    @property
    def names_the_place(self) -> bool:
        """Whether its step, phase and exchange were named as it recorded them."""
        fired = self.fired or {}
        where = ", ".join(filter(None, (fired.get("phase"), fired.get("exchange"))))
        return self.names_the_rank and self.step == fired.get("step") and self.where == where


@dataclass
class Outcome:
    """A whole run."""

    status: int
    text: str
    attempts: list[Seen]
    seconds: float
    left: list[int] = field(default_factory=list)
    """Processes that outlived the launcher."""
    folder: Path = Path()


def run_plan(corpus: Path, folder: Path, plan: Sequence[Fault | None], **flags: Any) -> Outcome:
    """Train with one fault per attempt; the launcher restarts the ranks after each."""
    path = write_plan(plan, folder / "chaos")
    run = launch(
        corpus,
        folder,
        launcher=OUR_LAUNCHER,
        program=PROGRAM,
        max_restarts=len(plan),
        variables={VARIABLE: str(path)},
        **flags,
    )
    try:
        return _follow(run, folder, list(plan))
    finally:
        run.stop()


def _follow(run: Launched, folder: Path, plan: list[Fault | None]) -> Outcome:
    attempts = [Seen(fault=fault) for fault in [*plan, None]]
    family: set[int] = set()
    while run.process.poll() is None:
        assert time.monotonic() - run.began < WALL_LIMIT_S, run.text()
        family |= _children(run.process.pid)
        for number, seen in enumerate(attempts):
            _look(seen, number, folder)
        time.sleep(0.05)
    for number, seen in enumerate(attempts):
        _look(seen, number, folder)
        _read_cause(seen, number, folder)
    left = [pid for pid in family if psutil.pid_exists(pid)]
    seconds = time.monotonic() - run.began
    return Outcome(run.process.returncode, run.text(), attempts, seconds, left, folder)


def _children(pid: int) -> set[int]:
    try:
        return {child.pid for child in psutil.Process(pid).children(recursive=True)}
    except psutil.NoSuchProcess:
        return set()


def _look(seen: Seen, number: int, folder: Path) -> None:
    """Note when the fault has struck, and when the processes of its attempt are gone."""
    record = folder / "chaos" / f"fired-{number}.json"
    if seen.fired is None and record.exists():
        seen.fired = json.loads(record.read_text())
    if seen.fired is not None and seen.ended_s is None:
        pids = {int(_PROCESS.findall(log.read_text())[-1]) for log in _logs(folder, number)}
        if not any(_runs(pid) for pid in pids):
            seen.ended_s = time.time() - seen.fired["time"]


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _logs(folder: Path, number: int) -> list[Path]:
    return sorted((folder / "report" / FOLDER_NAME / f"attempt_{number}").glob("rank_*.log"))


def _read_cause(seen: Seen, number: int, folder: Path) -> None:
    """Who was named, in the logs of the ranks that survived, and when the first of them knew."""
    found = []
    for log in _logs(folder, number):
        for line in log.read_text().splitlines():
            match = _NAMED.search(line)
            if match and "stopped because" in line:
                found.append((_time(line), match))
    if not found or seen.fired is None:
        return
    when, match = min(found, key=lambda entry: entry[0])
    seen.rank, seen.step, seen.where, seen.error = match[1], int(match[2] or 0), match[3], match[4]
    seen.named_s = max(0.0, when - seen.fired["time"])


def _time(line: str) -> float:
    """Of a line of a rank's log, in seconds since 1970."""
    whole, _, milliseconds = line[:23].partition(",")
    return time.mktime(time.strptime(whole, "%Y-%m-%d %H:%M:%S")) + int(milliseconds) / 1000
