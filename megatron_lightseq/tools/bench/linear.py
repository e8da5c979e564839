"""Linear attention on one rank beside softmax attention and Megatron's gated delta rule in torch, forward and backward.

Both sides of a row run alternately in one process. Time is the process's CPU time on one thread. Memory is what the
process holds at most beyond what it held before the call, as the kernel counts it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

import megatron_lightseq as mls
from megatron_lightseq.tools.bench.clock import torch_threads
from megatron_lightseq.tools.markdown import markdown_table
from megatron_lightseq.tools.provenance import provenance

HEADER = ("linear attention", "tokens", "ours", "beside", "speed", "ours, memory", "beside, memory")
NAME = "linear"
HEADS, HEAD_DIM = 4, 64
LENGTHS = (1024, 4096, 16384)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearRow:
    """One kind of linear attention and one length: medians, ours and what is beside it."""

    family: str
    beside: str
    tokens: int
    seconds: tuple[float, float]
    """CPU time of a forward and backward pass."""
    peak_mib: tuple[float, float]
    """Memory beyond the inputs and their gradients."""

    def cells(self) -> list[str]:
        """Cells of the table."""
        (ours, other), (mine, theirs) = self.seconds, self.peak_mib
        return [
            self.family,
            f"{self.tokens:,}",
            f"{ours * 1e3:,.0f} ms",
            f"{self.beside} {other * 1e3:,.0f} ms",
            f"{other / ours:.1f}x",
            f"{mine:,.0f} MiB",
            f"{theirs:,.0f} MiB",
        ]


def measure(
    lengths: Sequence[int], repetitions: int, progress: Callable[[LinearRow], None]
) -> list[LinearRow]:
    """Measure every kind for every length.

    Args:
        lengths: tokens.
        repetitions: the median of this many.
        progress: called with every row as it is measured.
    """
    rows = []
    with torch_threads(1):
        for tokens in lengths:
            inputs = _inputs(tokens)
            for family, ours, beside, other in _comparisons(inputs):
                seconds, peaks = _alternated((ours, other), inputs, repetitions)
                row = LinearRow(family=family, beside=beside, tokens=tokens, seconds=seconds, peak_mib=peaks)
                progress(row)
                rows.append(row)
    return rows


def _inputs(tokens: int) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, tokens, 1, HEADS, HEAD_DIM, generator=source).unbind()
    log_decay, beta = torch.rand(2, tokens, 1, HEADS, generator=source).unbind()
    k = normalize(k, dim=-1)
    given = {"q": normalize(q, dim=-1), "k": k, "v": v, "log_decay": -0.1 * log_decay, "beta": beta}
    return {name: x.clone().requires_grad_() for name, x in given.items()}


def _comparisons(x: dict[str, Tensor]) -> list[tuple[str, Callable[[], Tensor], str, Callable[[], Tensor]]]:
    q, k, v, log_decay, beta = x.values()
    softmax = partial(mls.dist_attention, q, k, v)
    scalar = partial(mls.dist_linear_attention, q, k, v, log_decay=log_decay)
    gated = partial(mls.dist_linear_attention, q, k, v, log_decay=log_decay, beta=beta)
    return [
        ("a decay of each head", scalar, "our softmax kernel", softmax),
        ("gated delta rule", gated, "Megatron's torch path", partial(_megatron, q, k, v, log_decay, beta)),
    ]


def _megatron(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    from megatron.core.ssm.gated_delta_net import torch_chunk_gated_delta_rule

    q, k, v, log_decay, beta = (x.transpose(0, 1) for x in (q, k, v, log_decay, beta))
    out: Tensor = torch_chunk_gated_delta_rule(q, k, v, g=log_decay, beta=beta)[0]
    return out


def _alternated(
    calls: Sequence[Callable[[], Tensor]], inputs: dict[str, Tensor], repetitions: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Median seconds and MiB of two calls, which take turns; the first round warms up."""
    seconds: list[list[float]] = [[], []]
    peaks: list[list[float]] = [[], []]
    for _ in range(repetitions + 1):
        for index, call in enumerate(calls):
            found = _measured(call, inputs)
            seconds[index].append(found[0])
            peaks[index].append(found[1])
    first, second = (statistics.median(times[1:]) for times in seconds)
    mine, theirs = (statistics.median(sizes[1:]) for sizes in peaks)
    return (first, second), (mine, theirs)


def _measured(call: Callable[[], Tensor], inputs: dict[str, Tensor]) -> tuple[float, float]:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before, began = _status("VmRSS"), time.process_time()
    out = call()
    torch.autograd.grad(out, list(inputs.values()), torch.ones_like(out), allow_unused=True)
    seconds = time.process_time() - began
    return seconds, (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    """A line of /proc/self/status, in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise AssertionError(f"no {field} in /proc/self/status")


def caption(repetitions: int) -> str:
    """What the table shows."""
    return (
        f"Forward and backward of one rank, fp32, {HEADS} heads of {HEAD_DIM}, CPU time of one thread, medians of "
        f"{repetitions}, both sides in turn. Memory: the most that the process holds beyond its inputs. {provenance()}"
    )


def write_reports(rows: Sequence[LinearRow], folder: Path, repetitions: int) -> list[Path]:
    """Write NAME.json and NAME.md; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{NAME}.{suffix}" for suffix in ("json", "md")]
    records = {"machine": provenance(), "rows": [asdict(row) for row in rows]}
    paths[0].write_text(json.dumps(records, indent=1) + "\n")
    paths[1].write_text(
        f"{markdown_table(HEADER, [row.cells() for row in rows])}\n\n{caption(repetitions)}\n"
    )
    return paths
