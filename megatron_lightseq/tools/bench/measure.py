"""Timing and errors of the kernel benchmark.

The machine may be shared. With one thread, the clock is therefore the CPU time of the thread, which does not advance
while another process uses the core. Implementations alternate within every repetition, so that disturbances affect all
of them, and medians are reported. Pressure on shared caches remains; it slows all of them down.
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
from megatron_lightseq.tools.bench.implementations import (
    Implementation,
    Inputs,
    exact_results,
    implementations,
)

ERROR_SEQ_LENGTH = 1024
"""Errors are measured up to this length: the fp64 formulas need S x S memory."""
ERROR_DRAWS = 5
"""Number of random inputs: the largest error for one input depends on a few values near a rounding boundary."""
PEAK_REPETITIONS = 20
DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """One implementation on one case."""

    implementation: str
    forward_s: float
    backward_s: float
    forward_gflops: float
    backward_gflops: float
    errors: dict[str, float]
    """Largest error of out, dq, dk, dv against fp64, relative to the largest value; median over several inputs."""

    @property
    def total_s(self) -> float:
        """Forward plus backward."""
        return self.forward_s + self.backward_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One case: the timings of all implementations, ours first."""

    case: KernelCase
    timings: tuple[Timing, ...]
    peak_gflops: float
    """Peak of all threads in use, for the instructions that our kernel uses for this dtype."""

    def ratio(self, attribute: str) -> float:
        """Torch's time divided by ours."""
        ours, torchs = self.timings
        return float(getattr(torchs, attribute) / getattr(ours, attribute))


def measure(case: KernelCase, repetitions: int) -> Row:
    """Time all implementations of a case alternately, after one warm-up round."""
    inputs = Inputs.random(case)
    compared = implementations(case, inputs)
    seconds: dict[tuple[str, str], list[float]] = {(one.name, d): [] for one in compared for d in DIRECTIONS}
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for repetition in range(repetitions + 1):
        for one in compared:
            for direction, call in (("forward", one.forward), ("backward", one.backward)):
                taken = timed(call, clock)
                if repetition > 0:
                    seconds[one.name, direction].append(taken)
    errors = measure_errors(case)
    timings = tuple(_timing(case, one, seconds, errors[one.name]) for one in compared)
    return Row(case=case, timings=timings, peak_gflops=peak_gflops(case.dtype) * torch.get_num_threads())


def _timing(
    case: KernelCase,
    implementation: Implementation,
    seconds: dict[tuple[str, str], list[float]],
    errors: dict[str, float],
) -> Timing:
    forward, backward = (statistics.median(seconds[implementation.name, d]) for d in DIRECTIONS)
    return Timing(
        implementation=implementation.name,
        forward_s=forward,
        backward_s=backward,
        forward_gflops=case.flops("forward") / forward * 1e-9,
        backward_gflops=case.flops("backward") / backward * 1e-9,
        errors=errors,
    )


def measure_errors(case: KernelCase) -> dict[str, dict[str, float]]:
    """Largest error against fp64 relative to the largest value, by implementation and result.

    Median over several inputs of at most ERROR_SEQ_LENGTH tokens.
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
    for one in implementations(case, inputs):
        one.forward()
        one.backward()
        pairs = zip(("out", "dq", "dk", "dv"), one.results(), exact, strict=True)
        errors[one.name] = {
            name: float((got.double() - want).abs().max() / want.abs().max()) for name, got, want in pairs
        }
    return errors


def peak_gflops(dtype: torch.dtype) -> float:
    """Measured peak of one core: products of registers only, with the instructions our kernel uses for the dtype."""
    load_extension()
    return float(torch.ops.mls.cpu_peak_gflops(dtype == torch.bfloat16, PEAK_REPETITIONS))


def run_cases(cases: Sequence[KernelCase], repetitions: int, progress: Callable[[Row], None]) -> list[Row]:
    """Measure all cases; ``progress`` is called with each result."""
    rows = []
    for case in cases:
        rows.append(measure(case, repetitions))
        progress(rows[-1])
    return rows
