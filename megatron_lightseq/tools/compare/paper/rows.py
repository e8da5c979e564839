"""The paper's experiments, scaled to this machine: the paper's figure, ours, and our prediction for its cluster.

    python -m megatron_lightseq.tools.compare.paper.rows CONFIG_FOLDER OUTPUT_FOLDER [ROW ...]

Rows are numbered as in scripts/reproduce_paper.sh.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_lightseq.tools.compare.paper.experiment import Experiments, Row
from megatron_lightseq.tools.compare.paper.memory_rows import longest
from megatron_lightseq.tools.compare.paper.schedule_rows import balance, overlap
from megatron_lightseq.tools.compare.paper.speed_rows import (
    against_megatron,
    against_ring_and_ulysses,
    against_rsa,
    recompute,
)
from megatron_lightseq.tools.markdown import markdown_table

ROWS: Mapping[str, Callable[[Experiments], list[Row]]] = {
    "1": against_megatron,
    "2": longest,
    "3": against_rsa,
    "4": against_ring_and_ulysses,
    "5": recompute,
    "6": overlap,
    "7": balance,
}


def markdown(rows: Sequence[Row]) -> str:
    """The table."""
    header = ["row", "what", "paper", "here", "predicted for the paper's cluster", "note"]
    return markdown_table(header, [list(asdict(row).values()) for row in rows]) + "\n"


def _progress(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def main(arguments: Sequence[str]) -> int:
    """Fill the given rows (default: all); exit status 0 if the losses of all comparisons agree."""
    wanted = list(arguments[2:]) or list(ROWS)
    experiments = Experiments(configs=Path(arguments[0]), output=Path(arguments[1]), report=_progress)
    rows = [row for number in wanted for row in ROWS[number](experiments)]
    experiments.output.mkdir(parents=True, exist_ok=True)
    (experiments.output / "paper-rows.md").write_text(markdown(rows))
    record = {
        "rows": [asdict(row) for row in rows],
        "comparisons": {label: made.to_dict() for label, made in experiments.comparisons.items()},
    }
    (experiments.output / "paper-rows.json").write_text(json.dumps(record, indent=1) + "\n")
    sys.stdout.write(markdown(rows))
    return 0 if all(made.agrees for made in experiments.comparisons.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
