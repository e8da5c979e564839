"""Run by test_verify in a separate process: cells that must fail, followed by one that must pass."""

from __future__ import annotations

import sys

from megatron_lightseq.tools.verify.cells import Cell
from megatron_lightseq.tools.verify.ranks import local_ranks

CP2 = {"context_parallel_size": 2, "cp_method": "lightseq"}
CELLS = [
    Cell(name="other weights", world_size=2, values={**CP2, "seed": 7}),
    Cell(name="other average", world_size=2, values={**CP2, "calculate_per_token_loss": False}),
    Cell(name="impossible", world_size=2, values={**CP2, "cp_layout": "zigzag"}),
    Cell(
        name="no reference",
        world_size=2,
        values={**CP2, "num_query_groups": 2},
        model={"num_query_groups": 3},
    ),
    Cell(name="right", world_size=2, values=CP2),
]


def main() -> None:
    with local_ranks(2, CELLS, {}) as verification:
        for report in verification.lead():
            numbers = None if report.verdict is None else (report.verdict.loss, report.verdict.gradient)
            sys.stdout.write(f"{report.cell.name}|{report.passed}|{numbers}|{report.error}\n")


if __name__ == "__main__":
    main()
