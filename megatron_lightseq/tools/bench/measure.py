"""Timing and errors of the kernel benchmark.

The machine may be shared. With one thread the clock is therefore the thread's CPU time, which stands still while
another process has the core; contenders take turns within every repetition, so that what disturbs one disturbs the
others; and medians are reported. What remains is pressure on shared caches, which costs everybody something.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from megatron_lightseq.kernels.extension import load_extension
from megatron_lightseq.tools.bench.cases import KernelCase
from megatron_lightseq.tools.bench.clock import timed
from megatron_lightseq.tools.bench.contenders import Contender, Inputs, contenders, exact_results

ERROR_SEQ_LENGTH = 1024
"""Errors are measured at most at this length: the fp64 formulas need S x S memory."""
ERROR_DRAWS = 5
"""Of the inputs: the largest error of one draw is that of a few values close to the middle of two roundings."""
PEAK_REPETITIONS = 20
DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """One contender on one case."""

    contender: str
    forward_s: float
    backward_s: float
    forward_gflops: float
    backward_gflops: float
    errors: dict[str, float]
    """Largest error of out, dq, dk, dv against fp64, relative to the largest value; median of several draws."""

    @property
    def total_s(self) -> float:
        """Forward and backward."""
        return self.forward_s + self.backward_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One case: what every contender took, ours first."""

    case: KernelCase
    timings: tuple[Timing, ...]
    peak_gflops: float
    """Of all threads in use, in the units that our kernel uses for this dtype."""

    def ratio(self, attribute: str) -> float:
        """How many times longer torch takes."""
        ours, torchs = self.timings
        return float(getattr(torchs, attribute) / getattr(ours, attribute))


def measure(case: KernelCase, repetitions: int) -> Row:
    """Time all contenders on a case, taking turns, after one round that nobody counts."""
    inputs = Inputs.random(case)
    entrants = contenders(case, inputs)
    seconds: dict[tuple[str, str], list[float]] = {(e.name, d): [] for e in entrants for d in DIRECTIONS}
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for repetition in range(repetitions + 1):
        for entrant in entrants:
            for direction, call in (("forward", entrant.forward), ("backward", entrant.backward)):
                taken = timed(call, clock)
                if repetition > 0:
                    seconds[entrant.name, direction].append(taken)
    errors = measure_errors(case)
    timings = tuple(_timing(case, entrant, seconds, errors[entrant.name]) for entrant in entrants)
    return Row(case=case, timings=timings, peak_gflops=peak_gflops(case.dtype) * torch.get_num_threads())


def _timing(
    case: KernelCase,
    entrant: Contender,
    seconds: dict[tuple[str, str], list[float]],
    errors: dict[str, float],
) -> Timing:
    forward, backward = (statistics.median(seconds[entrant.name, d]) for d in DIRECTIONS)
    return Timing(
        contender=entrant.name,
        forward_s=forward,
        backward_s=backward,
        forward_gflops=case.flops("forward") / forward * 1e-9,
        backward_gflops=case.flops("backward") / backward * 1e-9,
        errors=errors,
    )


def measure_errors(case: KernelCase) -> dict[str, dict[str, float]]:
    """Contender -> result -> largest error against fp64 over the largest value: median of several draws.

    On at most 1024 tokens.
    """
    length = min(case.seq_length, ERROR_SEQ_LENGTH)
    kind = "documents" if case.mask_kind == "short documents" and length < case.seq_length else case.mask_kind
    small = replace(case, seq_length=length, mask_kind=kind)
    draws = [_errors_of_draw(small, seed) for seed in range(ERROR_DRAWS)]
    return {
        name: {result: statistics.median(draw[name][result] for draw in draws) for result in results}
        for name, results in draws[0].items()
    }


def _errors_of_draw(case: KernelCase, seed: int) -> dict[str, dict[str, float]]:
    inputs = Inputs.random(case, seed)
    exact = exact_results(case, inputs)
    errors = {}
    for entrant in contenders(case, inputs):
        entrant.forward()
        entrant.backward()
        pairs = zip(("out", "dq", "dk", "dv"), entrant.results(), exact, strict=True)
        errors[entrant.name] = {
            name: float((got.double() - want).abs().max() / want.abs().max()) for name, got, want in pairs
        }
    return errors


def peak_gflops(dtype: torch.dtype) -> float:
    """What one core does at most: products of registers only, in the units our kernel uses for the dtype."""
    load_extension()
    return float(torch.ops.mls.cpu_peak_gflops(dtype == torch.bfloat16, PEAK_REPETITIONS))


def run_cases(cases: Sequence[KernelCase], repetitions: int, progress: Callable[[Row], None]) -> list[Row]:
    """Measure case after case, reporting each."""
    rows = []
    for case in cases:
        rows.append(measure(case, repetitions))
        progress(rows[-1])
    return rows
