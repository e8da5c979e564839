"""The GPU benchmark as JSON and Markdown: rates, ratios to torch's fastest backend, and whether goals were reached."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch

from megatron_lightseq.tools.bench.gpu_implementations import RING_STEPS, GpuCase
from megatron_lightseq.tools.bench.gpu_model import predicted_tflops

DIRECTIONS = ("forward", "backward")
GOALS = {"forward": 0.9, "backward": 0.85}
"""Minimum ratio of our rate to that of torch's fastest backend, in every case of ``tokens`` tokens in total."""
RING_GOAL = 1.05
"""Maximum ratio of the time for several blocks of keys to the time for a single call."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One implementation on one case; seconds are medians, None if it did not run, and ``note`` says why."""

    case: GpuCase
    implementation: str
    is_ours: bool
    forward_s: float | None
    backward_s: float | None
    note: str = ""

    def seconds(self, direction: str) -> float | None:
        """Median duration; None if it did not run."""
        return self.forward_s if direction == "forward" else self.backward_s

    def tflops(self, direction: str) -> float | None:
        """Rate of useful operations; None if it did not run."""
        seconds, factor = self.seconds(direction), 1.0 if direction == "forward" else 2.5
        return None if seconds is None else factor * self.case.forward_flops / seconds / 1e12


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Machine, ceilings and earlier checks."""

    environment: dict[str, str]
    ceilings: dict[str, float]
    checks: tuple[str, ...]


def environment(commit: str) -> dict[str, str]:
    """Device, driver and versions."""
    return {
        "device": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "driver": _ask_nvidia_smi("driver_version"),
        "clock at the start": clock(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "python": platform.python_version(),
        "commit": commit,
    }


def clock() -> str:
    """The multiprocessors' clock now and at most, temperature and power, as nvidia-smi prints them."""
    return _ask_nvidia_smi("clocks.sm,clocks.max.sm,temperature.gpu,power.draw")


def _ask_nvidia_smi(fields: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return (done.stdout.splitlines() or ["unknown"])[0].strip()


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def best_of_torch(results: Sequence[Measured], case: GpuCase, direction: str) -> float | None:
    """The highest rate of torch's fused backends on a case in TFLOP/s; Triton is not part of the goals."""
    rates = [
        one.tflops(direction) for one in results if one.case == case and one.implementation.startswith("sdpa")
    ]
    return max((rate for rate in rates if rate is not None), default=None)


def table(results: Sequence[Measured], matmul_tflops: float, is_hopper: bool = False) -> str:
    """Markdown table with a line per case, direction and implementation; on Hopper with our predicted rates."""
    lines = [
        "| D | mask | heads | S | direction | implementation | ms | TFLOP/s | predicted | of matmul "
        "| relative to torch |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in dict.fromkeys(one.case for one in results):
        heads = "MHA" if case.kv_share == 1 else f"GQA {case.kv_share}"
        shape = (str(case.head_dim), "causal" if case.causal else "full", heads, str(case.seq_length))
        for direction in DIRECTIONS:
            best = best_of_torch(results, case, direction)
            for one in results:
                if one.case == case:
                    cells = (
                        *shape,
                        direction,
                        one.implementation,
                        *_figures(one, direction, matmul_tflops, best, is_hopper),
                    )
                    lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _figures(
    one: Measured, direction: str, matmul_tflops: float, best: float | None, is_hopper: bool
) -> tuple[str, str, str, str, str]:
    seconds, rate = one.seconds(direction), one.tflops(direction)
    ends = predicted_tflops(direction, one.case.head_dim) if one.is_ours and is_hopper else None
    predicted = "-" if ends is None else f"{ends[0]:.0f} to {ends[1]:.0f}"
    if seconds is None or rate is None:
        return "-", one.note.replace("|", "/") or "-", predicted, "-", "-"
    ratio = "-" if best is None else f"{rate / best:.2f}"
    return f"{seconds * 1e3:.3f}", f"{rate:.0f}", predicted, f"{rate / matmul_tflops:.0%}", ratio


def goals(results: Sequence[Measured]) -> list[str]:
    """A line per goal: the measured range, and whether all of it reaches the goal."""
    return [*_rate_goals(results), *_ring_goals(results)]


def _rate_goals(results: Sequence[Measured]) -> Iterator[str]:
    counted = [
        one for one in results if one.implementation == "ours" and one.case.seq_length <= one.case.tokens
    ]
    kinds = sorted({(one.case.head_dim, one.case.causal) for one in counted}, reverse=True)
    for direction, goal in GOALS.items():
        for head_dim, causal in kinds:
            ratios = []
            for one in counted:
                rate, best = one.tflops(direction), best_of_torch(results, one.case, direction)
                if (one.case.head_dim, one.case.causal) == (head_dim, causal) and rate and best:
                    ratios.append(rate / best)
            what = f"{direction}, D = {head_dim}, {'causal' if causal else 'full'}, rate relative to torch's fastest"
            yield _verdict(what, ratios, f"at least {goal}", bool(ratios) and min(ratios) >= goal)


def _ring_goals(results: Sequence[Measured]) -> Iterator[str]:
    whole = {one.case: one for one in results if one.implementation == "ours"}
    for direction in DIRECTIONS:
        ratios = []
        for one in results:
            parts = one.seconds(direction) if one.implementation == f"ours, {RING_STEPS} blocks" else None
            alone = whole[one.case].seconds(direction) if one.case in whole else None
            if parts and alone and one.case.seq_length >= one.case.tokens:
                ratios.append(parts / alone)
        what = f"{direction}, time of {RING_STEPS} blocks relative to one call, long sequences"
        yield _verdict(what, ratios, f"at most {RING_GOAL}", bool(ratios) and max(ratios) <= RING_GOAL)


def _verdict(what: str, ratios: Sequence[float], wanted: str, reached: bool) -> str:
    if not ratios:
        return f"{what}: not measured (goal: {wanted})"
    found = f"{min(ratios):.2f} to {max(ratios):.2f}"
    return f"{what}: {found} (goal: {wanted}): {'reached' if reached else 'NOT reached'}"


def write_report(report: Report, results: Sequence[Measured], folder: Path) -> None:
    """Write gpu.json and gpu.md, replacing those of earlier calls."""
    folder.mkdir(parents=True, exist_ok=True)
    verdicts = goals(results)
    content = {**asdict(report), "goals": verdicts, "results": [asdict(one) for one in results]}
    (folder / "gpu.json").write_text(json.dumps(content, indent=1) + "\n")
    head = [f"- {name}: {value}" for name, value in {**report.environment, **report.ceilings}.items()]
    checked = [f"- {check}" for check in report.checks] or ["- none"]
    goal_lines = [f"- {line}" for line in verdicts]
    is_hopper = report.environment.get("capability") == "9.0"
    body = table(results, report.ceilings["matmul_tflops"], is_hopper)
    text = "\n".join([*head, "", "Checks:", *checked, "", "Goals:", *goal_lines, "", body])
    (folder / "gpu.md").write_text(text + "\n")
