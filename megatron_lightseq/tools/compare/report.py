"""Reports of a comparison: a table in the terminal, Markdown, JSON and plots."""

from __future__ import annotations

import json
from pathlib import Path

from rich.table import Table

from megatron_lightseq.tools.compare.tables import Comparison, Figures
from megatron_lightseq.tools.markdown import markdown_table

COLUMNS = (
    "system",
    "tokens/s",
    "step s (min-max)",
    "speed-up",
    "tensors MiB",
    "resident MiB",
    "sent MiB/step",
    "exposed s",
    "attn fwd",
    "GFLOP/s",
    "of ceiling",
    "final loss",
)
_MIB = 2**20


def cells(comparison: Comparison, row: Figures) -> list[str]:
    """One row of the table; for a system without figures, the last cell says why."""
    if row.problem is not None:
        word = "cannot run here" if row.refused else "failed"
        return [row.title, *["-"] * (len(COLUMNS) - 2), f"{word}: {row.problem.splitlines()[0]}"]
    speedup = comparison.speedup(row)
    if row.system in comparison.disagreements:
        shown = "refused: loss differs"
    else:
        shown = "-" if speedup is None else f"{speedup:.2f}x"
    return [
        row.title,
        f"{row.tokens_per_second:,.0f}",
        f"{row.median_seconds:.3f} ({min(row.step_seconds):.3f}-{max(row.step_seconds):.3f})",
        shown,
        "-" if row.peak_tensor_bytes is None else f"{row.peak_tensor_bytes / _MIB:.1f}",
        f"{row.peak_resident_bytes / _MIB:.0f}",
        f"{row.bytes_sent / _MIB:.2f}",
        "-" if row.exposed_seconds is None else f"{row.exposed_seconds:.3f}",
        "-" if row.attention_forwards is None else str(row.attention_forwards),
        f"{row.flops_per_second / 1e9:.1f}",
        "-" if row.ceiling_fraction is None else f"{row.ceiling_fraction:.0%}",
        f"{row.losses[-1]:.6f}",
    ]


def caption(comparison: Comparison) -> str:
    """What was measured, in one line."""
    setting = comparison.setting
    recompute = setting["recompute_granularity"] or "no"
    return (
        f"{comparison.world_size} ranks of {setting['threads_per_rank']} thread(s), {setting['num_layers']} layers, "
        f"hidden size {setting['hidden_size']}, {setting['num_attention_heads']} heads "
        f"({setting['num_query_groups']} key/value), {setting['seq_length']} tokens, batch size "
        f"{setting['global_batch_size']}, {comparison.precision}, {recompute} recompute unless stated otherwise"
    )


def verdict(comparison: Comparison) -> str:
    """Whether the losses agree, and which systems differ or have failed."""
    rule = f"the loss of every step is within {comparison.tolerance:g} (relative) of {comparison.baseline}"
    failures = [row for row in comparison.figures if row.problem is not None and not row.refused]
    lines = [f"{name}: {how}" for name, how in comparison.disagreements.items()]
    lines += [f"{row.system} failed: {row.problem}" for row in failures]
    return f"losses agree: {rule}" if not lines else "\n".join([f"NOT comparable, the rule: {rule}", *lines])


def terminal_table(comparison: Comparison) -> Table:
    """The comparison as a table for rich."""
    table = Table(title=caption(comparison), title_justify="left")
    for number, column in enumerate(COLUMNS):
        table.add_column(
            column, justify="left" if number in (0, len(COLUMNS) - 1) else "right", overflow="fold"
        )
    for row in comparison.figures:
        table.add_row(*cells(comparison, row))
    return table


def markdown(comparison: Comparison) -> str:
    """The table, its caption, the verdict and the machine."""
    table = markdown_table(COLUMNS, [cells(comparison, row) for row in comparison.figures])
    judgement = verdict(comparison).replace("\n", "  \n")
    return "\n".join(
        [f"{caption(comparison)}.", "", table, "", f"{judgement}.", "", f"{comparison.machine}.", ""]
    )


def write(comparison: Comparison, folder: Path, name: str = "compare") -> list[Path]:
    """Write NAME.json, NAME.md and NAME.png to a folder; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{kind}" for kind in ("json", "md", "png")]
    paths[0].write_text(json.dumps(comparison.to_dict(), indent=1) + "\n")
    paths[1].write_text(markdown(comparison))
    draw(comparison, paths[2])
    return paths


def draw(comparison: Comparison, path: Path) -> None:
    """Draw bars of speed, memory and bytes by system."""
    from matplotlib.figure import Figure

    rows = [row for row in comparison.figures if row.problem is None][::-1]
    panels = (
        ("tokens/s", [row.tokens_per_second for row in rows]),
        ("peak tensors, MiB per rank", [(row.peak_tensor_bytes or 0) / _MIB for row in rows]),
        ("sent, MiB per rank and step", [row.bytes_sent / _MIB for row in rows]),
    )
    figure = Figure(figsize=(13, 1.5 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    labels = [
        row.title + (" (loss differs)" if row.system in comparison.disagreements else "") for row in rows
    ]
    for axis, (title, values) in zip(axes, panels, strict=True):
        axis.barh(labels, values, color=["#4c72b0" if "Megatron" in label else "#dd8452" for label in labels])
        axis.set_title(title)
        axis.grid(axis="x", alpha=0.3)
    figure.suptitle(caption(comparison), fontsize=9)
    figure.savefig(path, dpi=110)
