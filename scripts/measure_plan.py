#!/usr/bin/env python
"""Measures the memory of small runs on this machine, and compares it with what `lightseq plan` predicts for them.

python scripts/measure_plan.py                  # all runs; writes docs/results/plan-memory.json
python scripts/measure_plan.py "cp3 lightseq"   # some of them; prints the errors only
"""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_lightseq.tools.planner.cases import CASES
from megatron_lightseq.tools.planner.measured import compare, to_json

RESULT = Path(__file__).parents[1] / "docs" / "results" / "plan-memory.json"


def main(names: list[str]) -> int:
    """Measure the named runs, or all; the exit status is 1 if a planned peak is more than a tenth off."""
    chosen = [case for case in CASES if not names or case.name in names]
    compared = compare(chosen, lambda line: sys.stdout.write(line + "\n") and sys.stdout.flush())
    if not names:
        RESULT.write_text(to_json(compared))
    return int(any(abs(each.worst_error) > 0.1 for each in compared) or not compared)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
