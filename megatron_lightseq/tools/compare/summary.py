"""A summary of the comparisons for the README, from their records.

    python -m megatron_lightseq.tools.compare.summary FOLDER

writes FOLDER/summary.md from the records in FOLDER; missing records are left out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_lightseq.tools.markdown import markdown_table

_HEADER = ("what", "Megatron", "LightSeq", "ratio")
_BASELINE, _OURS = "megatron-tp-sp", "lightseq"


def summary(folder: Path) -> str:
    """The summary as a Markdown table."""
    rows = [*_speeds(folder), *_two_hosts(folder), *_lengths(folder), *_predictions(folder)]
    return markdown_table(_HEADER, rows) + "\n"


def _record(folder: Path, name: str) -> Any:
    path = folder / name
    return json.loads(path.read_text()) if path.exists() else None


def _pair(what: str, comparison: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """The row of one comparison; without a ratio if the losses differ."""
    rows = {row["system"]: row for row in comparison["figures"]}
    if not {_BASELINE, _OURS} <= set(rows) or rows[_BASELINE]["problem"] or rows[_OURS]["problem"]:
        return
    shown = [f"{rows[name]['tokens_per_second']:,.0f} tokens/s" for name in (_BASELINE, _OURS)]
    speedup = rows[_OURS]["speedup"]
    yield what, *shown, "refused: loss differs" if speedup is None else f"{speedup:.2f}x"


def _speeds(folder: Path) -> Iterator[tuple[str, ...]]:
    for precision in ("fp32", "bf16"):
        comparison = _record(folder, f"long-{precision}.json")
        if comparison is not None:
            setting = comparison["setting"]
            heads, tokens = setting["num_attention_heads"], setting["seq_length"]
            yield from _pair(f"two processes, {heads} heads, {tokens} tokens, {precision}", comparison)


def _two_hosts(folder: Path) -> Iterator[tuple[str, ...]]:
    for rate, comparison in (_record(folder, "two-hosts.json") or {}).items():
        heads, tokens = (comparison["setting"][key] for key in ("num_attention_heads", "seq_length"))
        yield from _pair(f"two hosts at {rate} Gbit/s, {heads} heads, {tokens} tokens", comparison)


def _lengths(folder: Path) -> Iterator[tuple[str, ...]]:
    for row in (_record(folder, "paper-rows.json") or {"rows": []})["rows"]:
        if row["row"] == "2":
            ratio, _, lengths = row["here"].partition(": ")
            ours, _, theirs = lengths.partition(";")[0].partition(" against ")
            yield row["what"], f"{theirs} tokens", f"{ours} tokens", ratio


def _predictions(folder: Path) -> Iterator[tuple[str, ...]]:
    record = _record(folder, "paper.json")
    if record is None:
        return
    seconds: dict[tuple[Any, ...], dict[str, float]] = {}
    for cell in record["cells"]:
        key = (cell["gpus"], cell["seq_length"], cell["model"]["name"])
        seconds.setdefault(key, {})[cell["system"]] = cell["predicted"]
    ratios = [times["megatron"] / times["lightseq"] for times in seconds.values() if "megatron" in times]
    what = f"predicted for 8 and 16 A100, {len(ratios)} cells of the paper's Table 1"
    yield what, "-", "-", f"{min(ratios):.2f}-{max(ratios):.2f}x"


def main(arguments: Sequence[str]) -> int:
    """Write and print the summary of a folder."""
    folder = Path(arguments[0])
    text = summary(folder)
    (folder / "summary.md").write_text(text)
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
