"""A table of published and predicted iteration times, with the errors of the predictions."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_lightseq.tools.compare.paper.model import iteration_seconds
from megatron_lightseq.tools.compare.paper.published import FITTED, TABLE_1, TABLE_4, TABLE_5, Cell
from megatron_lightseq.tools.markdown import markdown_table
from megatron_lightseq.tools.planner.rates import A100_CLUSTER, Rates

MEDIAN_BOUND, WORST_BOUND, ULYSSES_BOUND = 0.04, 0.15, 0.10
_HEADER = ("table", "system", "model", "GPUs", "tokens", "published s", "predicted s", "error", "used")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One cell of a table."""

    table: str
    cell: Cell
    published: float
    predicted: float
    fitted: bool
    """Whether the constants were fitted to it."""

    @property
    def error(self) -> float:
        """Relative error; positive if the predicted time is too long."""
        return self.predicted / self.published - 1


def predictions(constants: Rates = A100_CLUSTER) -> list[Prediction]:
    """The predictions for all cells of Tables 1, 4 and 5."""
    tables: Mapping[str, Mapping[Cell, float]] = {"1": TABLE_1, "4": TABLE_4, "5": TABLE_5}
    return [
        Prediction(
            table=table,
            cell=cell,
            published=published,
            predicted=iteration_seconds(cell, constants),
            fitted=cell in FITTED,
        )
        for table, cells in tables.items()
        for cell, published in cells.items()
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Accuracy for cells that the constants were not fitted to; absolute values of relative errors."""

    held_out: int
    """Number of cells of Table 1."""
    median: float
    worst: float
    ulysses_worst: float

    @property
    def holds(self) -> bool:
        """Whether all errors are within the bounds."""
        return (
            self.median <= MEDIAN_BOUND and self.worst <= WORST_BOUND and self.ulysses_worst <= ULYSSES_BOUND
        )

    def __str__(self) -> str:
        return (
            f"{self.held_out} cells of Table 1 that the constants were not fitted to: median error {self.median:.1%} "
            f"(bound {MEDIAN_BOUND:.0%}), largest {self.worst:.1%} (bound {WORST_BOUND:.0%}); Ulysses, Table 4: "
            f"largest {self.ulysses_worst:.1%} (bound {ULYSSES_BOUND:.0%})"
        )


def accuracy(found: Iterable[Prediction]) -> Accuracy:
    """The accuracy of a list of predictions."""
    found = list(found)
    errors = [abs(one.error) for one in found if one.table == "1" and not one.fitted]
    return Accuracy(
        held_out=len(errors),
        median=statistics.median(errors),
        worst=max(errors),
        ulysses_worst=max(abs(one.error) for one in found if one.table == "4"),
    )


def _row(one: Prediction) -> list[str]:
    cell = one.cell
    return [
        one.table,
        cell.system,
        cell.model.name,
        str(cell.gpus),
        f"{cell.seq_length // 1024}K",
        f"{one.published:.2f}",
        f"{one.predicted:.2f}",
        f"{one.error:+.1%}",
        "fitted" if one.fitted else "predicted",
    ]


def markdown(found: list[Prediction]) -> str:
    """The table and the accuracy as Markdown."""
    return f"{markdown_table(_HEADER, map(_row, found))}\n\n{accuracy(found)}.\n"


def show_paper(console: Console, folder: Path | None) -> int:
    """Print the table, and write paper.json and paper.md to a folder; exit status 0 if errors are within bounds."""
    found = predictions()
    table = Table(
        title="DistFlashAttn (arXiv 2310.03294v2), A100-80GB, NVLink, InfiniBand", title_justify="left"
    )
    for number, column in enumerate(_HEADER):
        table.add_column(column, justify="right" if 3 <= number <= 7 else "left")
    for one in found:
        table.add_row(*_row(one))
    console.print(table)
    summary = accuracy(found)
    console.print(str(summary), markup=False)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        cells = [
            {**asdict(one.cell), "published": one.published, "predicted": one.predicted} for one in found
        ]
        record = {"constants": asdict(A100_CLUSTER), "accuracy": asdict(summary), "cells": cells}
        (folder / "paper.json").write_text(json.dumps(record, indent=1) + "\n")
        (folder / "paper.md").write_text(markdown(found))
    return 0 if summary.holds else 1
