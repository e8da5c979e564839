"""Does what a new user does and times it: clones the committed repository into an empty folder, and runs the README's
two commands there in an empty environment.

    python scripts/try_fresh_clone.py [--no-tests] [--record]

The environment of this checkout is not used: the commands only get PATH, an empty HOME, and pip's variables (PIP_*).
`--record` writes the figures to docs/results/fresh_clone.json and the pictures to docs/images, for the documents. Uses
only the standard library.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPORT = Path("runs") / "gpt_stdlib" / "report"
PHASE = re.compile(r"\[lightseq\] (\w+)[^:]*: done in (\d+) s")
FIRST_STEP = re.compile(r"step +1/(\d+) ")
SHOWN_STEPS = 3
SHORT = ("--train-iters", "3", "--lr-warmup-iters", "1")


@dataclass(slots=True)
class Command:
    """A command and its timings."""

    words: list[str]
    seconds: float = 0.0
    status: int = 0
    phases: dict[str, int] = field(default_factory=dict)
    """Duration of each setup phase in seconds, as reported by the scripts."""
    first_step_s: float | None = None
    """Seconds from the start of the command to the line of the first training step."""
    lines: list[str] = field(default_factory=list)
    """Its output."""


def run(words: Sequence[str], folder: Path, environment: dict[str, str]) -> Command:
    """Run a command, show its output with the time since its start, and extract the figures."""
    command, start = Command(list(words)), time.monotonic()
    print(f"$ {' '.join(words)}", flush=True)
    with subprocess.Popen(
        words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            elapsed = time.monotonic() - start
            print(f"{elapsed:7.1f} s  {line}", end="", flush=True)
            if phase := PHASE.search(line):
                command.phases[phase[1]] = int(phase[2])
            if command.first_step_s is None and FIRST_STEP.search(line):
                command.first_step_s = round(elapsed, 1)
            command.lines.append(line.rstrip())
    command.seconds = round(time.monotonic() - start, 1)
    command.status = process.returncode
    print(f"-> status {command.status} after {command.seconds} s\n", flush=True)
    return command


def machine() -> dict[str, object]:
    """Facts about the machine that the figures depend on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (name := re.search(r"model name\s*: (.+)", info.read_text())):
        cpu = name[1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[1]  # over the last five minutes
    return {
        "cpu": cpu,
        "cores": cores,
        "system": f"{platform.system()} {platform.machine()}",
        "load": round(load, 1),
    }


def excerpt(command: Command) -> list[str]:
    """The header, the first and last steps and the end of a training run; the last line of other commands."""
    steps = [number for number, line in enumerate(command.lines) if line.startswith("step ")]
    if len(steps) <= 2 * SHOWN_STEPS:
        return command.lines[-1:]
    start = next(number for number, line in enumerate(command.lines) if "] starting " in line)
    head = command.lines[start : steps[SHOWN_STEPS - 1] + 1]
    return [*head, "...", *command.lines[steps[-SHOWN_STEPS] :]]


def path_without_environment() -> str:
    """PATH without an activated virtual environment."""
    active = os.environ.get("VIRTUAL_ENV")
    folders = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(f for f in folders if not active or not Path(f).is_relative_to(active))


def record(report: Path, commands: dict[str, Command], commit: str) -> None:
    """Store figures and pictures of the first run for the documents."""
    summary = json.loads((report / "summary.json").read_text())
    figures = {
        "commit": commit,
        "machine": machine(),
        "summary": summary,
        "commands": {
            name: {**asdict(command), "lines": excerpt(command)} for name, command in commands.items()
        },
    }
    (ROOT / "docs" / "results").mkdir(exist_ok=True)
    (ROOT / "docs" / "results" / "fresh_clone.json").write_text(json.dumps(figures, indent=1) + "\n")
    for picture in ("loss.png", "schedule.png"):
        shutil.copy(report / picture, ROOT / "docs" / "images" / picture)


def main() -> int:
    """Run the commands; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--no-tests", action="store_true", help="only run the training command")
    parser.add_argument("--record", action="store_true", help="store figures and pictures for the documents")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lightseq-fresh-") as folder:
        clone, home = Path(folder) / "megatron_lightseq", Path(folder) / "home"
        home.mkdir()
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=clone, check=True, capture_output=True, text=True
        ).stdout.strip()
        environment = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        environment |= {"PATH": path_without_environment(), "HOME": str(home)}
        commands = {"pretrain": run(["bash", "scripts/pretrain_gpt.sh"], clone, environment)}
        first_report = Path(folder) / "report"  # the second run overwrites it
        if (clone / REPORT).is_dir():
            shutil.copytree(clone / REPORT, first_report)
        commands["again"] = run(["bash", "scripts/pretrain_gpt.sh", *SHORT], clone, environment)
        if not options.no_tests:
            commands["tests"] = run(["bash", "scripts/run_tests.sh"], clone, environment)
        failed = [name for name, command in commands.items() if command.status]
        if options.record and not failed:
            record(first_report, commands, commit)
    print(f"failed: {', '.join(failed)}" if failed else f"all commands passed at commit {commit}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
