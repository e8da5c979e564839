"""Traffic on the link between two hosts: according to the schedule, and according to the interface counters.

    python -m megatron_lightseq.tools.compare.link DIR RATE...

prints and writes DIR/two-hosts.{md,json,png} from the comparisons DIR/two-hosts-RATE.json of
scripts/compare_two_hosts.sh, one per rate in Gbit/s.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_lightseq.config import PretrainConfig
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.schedule import METHODS, TensorShape, build, simulate
from megatron_lightseq.schedule.ir import Direction
from megatron_lightseq.tools.markdown import markdown_table

BYTES_TOLERANCE = 0.03
"""Relative, between predicted and counted bytes: small control messages are only in the count."""
_MIB = 2**20
_HEADER = (
    "link",
    "system",
    "tokens/s",
    "speed-up",
    "exposed s/step",
    "attention MiB/step by the schedule",
    "with collectives",
    "payload counted on the link",
    "difference",
)


def scheduled_bytes(config: PretrainConfig) -> int | None:
    """Bytes that attention sends in a step on the busiest rank, computed from the schedule alone.

    None if the schedule does not say: for recomputed attention, and for Ulysses and RSA, which also send heads or rows
    of scores that are not in the schedule.
    """
    context, model, training = config.context, config.model, config.training
    method = METHODS.get(context.cp_method)
    ranks = config.parallel.context_parallel_size
    repeats = (
        config.recompute.recompute_granularity is not None
        and not config.recompute.keep_attention_on_recompute
    )
    if method is None or method.full_rows or method.ulysses_size(ranks) > 1 or ranks == 1 or repeats:
        return None
    shape = TensorShape(
        batch=training.micro_batch_size,
        num_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        head_dim=model.head_dim,
        element_bytes=2 if training.bf16 else 4,
    )
    layout = SequenceLayout(context.layout_name if context.cp_layout == "auto" else context.cp_layout, ranks)
    sent = [0] * ranks
    for direction in Direction:
        schedule = build(method, layout, direction=direction, seq_length=training.seq_length)
        simulated = simulate(schedule, shape=shape)
        sent = [total + more for total, more in zip(sent, simulated.bytes_sent, strict=True)]
    micro_batches = training.global_batch_size // training.micro_batch_size
    return max(sent) * model.num_layers * micro_batches


def rows(rate: str, comparison: dict[str, Any]) -> list[list[str]]:
    """The rows of the table for one rate."""
    found = []
    for row in comparison["figures"]:
        if row["problem"] is not None:
            found.append(
                [f"{rate} Gbit/s", row["title"], *["-"] * (len(_HEADER) - 3), row["problem"].splitlines()[0]]
            )
            continue
        predicted, counted = predicted_bytes(row), row["link_bytes_sent"]
        speedup, scheduled = row["speedup"], row["scheduled_bytes_sent"]
        found.append(
            [
                f"{rate} Gbit/s",
                row["title"],
                f"{row['tokens_per_second']:,.0f}",
                "refused: loss differs" if speedup is None else f"{speedup:.2f}x",
                f"{row['exposed_seconds']:.3f}",
                "-" if scheduled is None else f"{scheduled / _MIB:.2f}",
                f"{predicted / _MIB:.2f}",
                "-" if counted is None else f"{counted / _MIB:.2f}",
                "-" if counted is None else f"{counted / predicted - 1:+.1%}",
            ]
        )
    return found


def predicted_bytes(row: dict[str, Any]) -> int:
    """Bytes that one rank per host should send: attention by its schedule, collectives by their sizes."""
    attention = (
        row["attention_bytes_sent"] if row["scheduled_bytes_sent"] is None else row["scheduled_bytes_sent"]
    )
    return int(attention + row["bytes_sent"] - row["attention_bytes_sent"])


def bytes_agree(comparison: dict[str, Any]) -> bool:
    """Whether all counts on the link are within the tolerance of their predictions."""
    return all(
        abs(row["link_bytes_sent"] / predicted_bytes(row) - 1) <= BYTES_TOLERANCE
        for row in comparison["figures"]
        if row["link_bytes_sent"] is not None
    )


def markdown(comparisons: dict[str, dict[str, Any]]) -> str:
    """All rates in one table."""
    lines = [row for rate, comparison in comparisons.items() for row in rows(rate, comparison)]
    agree = all(map(bytes_agree, comparisons.values()))
    verdict = (
        f"Predicted and counted bytes {'agree' if agree else 'DISAGREE'} (within {BYTES_TOLERANCE:.0%})."
    )
    return f"{markdown_table(_HEADER, lines)}\n\n{verdict}\n"


def draw(comparisons: dict[str, dict[str, Any]], path: Path) -> None:
    """Plot speed-ups against rates, with a line per system."""
    from matplotlib.figure import Figure

    lines: dict[str, list[tuple[float, float]]] = {}
    for rate, comparison in comparisons.items():
        for row in comparison["figures"]:
            if row["speedup"] is not None:
                lines.setdefault(row["title"], []).append((float(rate), row["speedup"]))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for title, points in lines.items():
        axis.plot(*zip(*sorted(points), strict=True), marker="o", label=title)
    axis.set_xscale("log")
    axis.set_xlabel("link between the hosts, Gbit/s")
    axis.set_ylabel("speed-up over the baseline")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str]) -> int:
    """Summarise; exit status 0 if losses and bytes agree at all rates."""
    folder, rates = Path(arguments[0]), arguments[1:]
    comparisons = {rate: json.loads((folder / f"two-hosts-{rate}.json").read_text()) for rate in rates}
    text = markdown(comparisons)
    sys.stdout.write(text)
    (folder / "two-hosts.md").write_text(text)
    (folder / "two-hosts.json").write_text(json.dumps(comparisons, indent=1) + "\n")
    draw(comparisons, folder / "two-hosts.png")
    agrees = all(comparison["agrees"] and bytes_agree(comparison) for comparison in comparisons.values())
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
