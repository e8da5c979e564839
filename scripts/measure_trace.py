#!/usr/bin/env python
"""Measures what tracing costs: the steps of one run with a trace in its middle.

python scripts/measure_trace.py    # three runs of configs/gpt_stdlib.yaml; writes docs/results/trace-cost.json

A third of the steps is traced, from one third of the run on. What is compared are medians of the time of traced steps
and of all others, without the first two steps, and without the step after which the trace was written.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from megatron_lightseq.tools.provenance import provenance

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "docs" / "results" / "trace-cost.json"
STEPS, RUNS = 45, 3


def measure(folder: Path) -> float:
    """The median time of a traced step over that of another one."""
    first, last = STEPS // 3 + 1, 2 * STEPS // 3
    flags = {
        "trace": folder / "trace",
        "trace-step-start": first,
        "trace-step-end": last,
        "train-iters": STEPS,
        "report-dir": folder / "report",
        "save": "null",
        "save-interval": "null",
        "resume": "off",
        "tensorboard-dir": "null",
        "eval-interval": "null",
        "progress": "off",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = ["bash", "scripts/pretrain_gpt.sh", "configs/gpt_stdlib.yaml", *words]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    lines = (folder / "report" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = {entry["step"]: entry["step_seconds"] for entry in map(json.loads, lines) if "step_seconds" in entry}
    traced = [seconds[step] for step in range(first, last + 1)]
    others = [seconds[step] for step in (*range(3, first), *range(last + 2, STEPS + 1))]
    return median(traced) / median(others)


def main() -> None:
    """Run, print and write."""
    ratios = []
    for _ in range(RUNS):
        with tempfile.TemporaryDirectory() as folder:
            ratios.append(measure(Path(folder)))
        sys.stdout.write(f"a traced step takes {ratios[-1]:.4f} of another\n")
        sys.stdout.flush()
    record = {
        "what": "median time of a traced step over that of another step of the same run, configs/gpt_stdlib.yaml",
        "command": "python scripts/measure_trace.py",
        "where": provenance(),
        "ratios": ratios,
        "median": median(ratios),
    }
    RESULT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
