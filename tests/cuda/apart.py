"""Runs the GPU tests of a file in separate processes: ``python -m tests.cuda.apart FILE [--seconds 90]``.

A kernel that hangs never returns, and one that reads beyond its memory breaks its process's CUDA context: every later
test of the process then fails too. So each combination of test function and last parameter (for example the head dim)
runs in a separate process, several at a time. A failure in one does not affect the others, and its last output is
printed here.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTEST = (sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider")
GROUP_SECONDS = 45.0
"""Time limit of one process, including its start."""
BROKEN = re.compile(r"CUDA error|CUDA driver|cudaError")
OUTCOMES = ("PASSED", "FAILED", "SKIPPED", "ERROR")
STARTED = re.compile(rf"^(\S+::.*?)(?: ({'|'.join(OUTCOMES)})\b.*)?$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The outcome of one group of tests."""

    group: str
    counts: Counter[str] = field(default_factory=Counter)
    trouble: str = ""
    """Empty, or a description of the first failure."""
    output: str = ""

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(self.counts.items())) or "nothing ran"
        return f"{self.group}: {counts}{': ' if self.trouble else ''}{self.trouble}"


def group_of(test: str) -> str:
    """The function of a test and its last parameter."""
    function, _, parameters = test.rpartition("::")[2].partition("[")
    return " ".join([function, *parameters.rstrip("]").split("-")[-1:]]).strip()


def collect(file: str) -> dict[str, list[str]]:
    """The tests of each group.

    Raises:
        RuntimeError: pytest collects no tests; the message contains its output.
    """
    done = subprocess.run(
        [*PYTEST, "-q", "--collect-only", file], cwd=ROOT, capture_output=True, text=True, check=False
    )
    groups: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        if "::" in line and line.startswith(file):
            groups.setdefault(group_of(line), []).append(line)
    if done.returncode or not groups:
        raise RuntimeError(f"pytest collected nothing in {file}: {done.stdout[-3000:]}{done.stderr[-1000:]}")
    return groups


def judge(group: str, tests: Sequence[str], output: str, status: int | None, seconds: float) -> Verdict:
    """The verdict on a group, from the output of pytest -v; ``status`` is None if the process was stopped."""
    seen = dict.fromkeys(tests, "")
    for line in output.splitlines():
        found = STARTED.match(line.rstrip())
        if found and found[1] in seen:
            seen[found[1]] = found[2] or "running"
    counts = Counter(outcome.lower() for outcome in seen.values() if outcome in OUTCOMES)
    over = [test for test, outcome in seen.items() if outcome in OUTCOMES]
    elsewhere = f"what follows {over[-1]}" if over else "its start"
    current = next((test for test, outcome in seen.items() if outcome == "running"), elsewhere)
    # With CI set, pytest's summary is not cut to the width of a terminal.
    failures = re.findall(
        r"^(?:FAILED|ERROR) (.*(?:\n(?!FAILED |ERROR |=|SKIPPED ).*)*)", output, re.MULTILINE
    )
    broken = next((failure for failure in failures if BROKEN.search(failure)), "")
    trouble = ""
    if status is None:
        trouble = f"STOPPED after {seconds:.0f} s in {current}"
    elif status not in (0, 1):
        trouble = f"DIED with status {status} in {current}"
    elif broken:
        trouble = f"BROKE in {broken}" + (f"; FAILED before: {failures[0]}" if failures[0] != broken else "")
    elif status:
        trouble = f"FAILED, the first: {failures[0] if failures else output[-2000:]}"
    return Verdict(group=group, counts=counts, trouble=trouble, output=output)


def run_group(group: str, tests: Sequence[str], end: float, threads: int) -> Verdict:
    """One process; it is stopped at ``end`` (on time.monotonic) or after GROUP_SECONDS."""
    limit = min(GROUP_SECONDS, end - time.monotonic())
    if limit < 1:
        return Verdict(group=group, trouble="NOT STARTED: total time limit reached")
    environment = {**os.environ, "CI": "1", "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*PYTEST, "-v", "--tb=short", *tests],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = None
        log.seek(0)
        return judge(group, tests, log.read(), status, limit)


def report(verdicts: Iterable[Verdict], say: Callable[[str], None] = print) -> int:
    """Prints the output of failed groups, one line per group, and a summary like pytest's. Returns the exit status."""
    verdicts = list(verdicts)
    troubled = [verdict for verdict in verdicts if verdict.trouble]
    for verdict in troubled:
        say(f"----- {verdict.group}\n{verdict.output.rstrip()}\n")
    for verdict in sorted(verdicts, key=lambda verdict: bool(verdict.trouble)):
        say(str(verdict))
    total = sum((verdict.counts for verdict in verdicts), Counter())
    order = [name for name in ("failed", "error", "passed", "skipped") if total[name]]
    say(", ".join(f"{total[name]} {name}" for name in order) or "nothing ran")
    return int(bool(troubled))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if no group failed."""
    parser = argparse.ArgumentParser(prog="tests.cuda.apart", description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--seconds", type=float, default=90.0, help="for everything")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1))
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    groups = collect(options.file)
    with ThreadPoolExecutor(options.jobs) as pool:
        return report(pool.map(lambda item: run_group(item[0], item[1], end, threads), groups.items()))


if __name__ == "__main__":
    sys.exit(main())
