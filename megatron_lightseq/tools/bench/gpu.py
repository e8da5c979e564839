"""Times the CUDA kernels against torch's on this GPU: ``python -m megatron_lightseq.tools.bench.gpu --out DIR``.

Useful operations: forward 4 * B * H * S^2 * D, backward 10 * B * H * S^2 * D, half of that with a causal mask.
16k tokens in total and H * D = 2048, as in the FlashAttention papers. Medians of CUDA events after a warm-up, on random
data. Two ceilings are measured as well: a large matrix product and a device-to-device copy.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_lightseq.kernels.cuda import CudaKernel
from megatron_lightseq.tools.bench.gpu_implementations import (
    BACKENDS,
    RING_STEPS,
    Flex,
    GpuCase,
    GpuImplementation,
    Ours,
    Sdpa,
)
from megatron_lightseq.tools.bench.gpu_report import Measured, Report, clock, environment, write_report

SEQ_LENGTHS = (16384, 2048, 4096, 8192, 32768)
"""The most important first: if the time limit is reached, the others are left out."""
LEFT_OUT = "left out: time limit reached"
Timer = Callable[[Callable[[], object]], float]


def event_seconds(run: Callable[[], object], repetitions: int = 10) -> float:
    """Median duration of one call by CUDA events, after three warm-up calls."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repetitions):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """Where implementations run, and how long they may take in total."""

    device: torch.device
    timer: Timer = event_seconds
    end: float = float("inf")
    """Time on ``clock`` after which nothing new is started."""
    clock: Callable[[], float] = time.monotonic

    def measure(self, case: GpuCase, implementation: GpuImplementation) -> Measured:
        """Both directions of one implementation on one case; a failure becomes a note in the result."""
        seconds: dict[str, float | None] = {"forward": None, "backward": None}
        note = ""
        for direction in seconds:
            if self.clock() > self.end:
                note = note or LEFT_OUT
                break
            try:
                with implementation.settings():
                    call = getattr(implementation, direction)(case, case.tensors(self.device))
                    seconds[direction] = self.timer(call)
            except Exception as error:  # noqa: BLE001  backends and compilers raise many kinds of errors
                note = (
                    note
                    or f"{direction}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
                )
        return Measured(
            case=case,
            implementation=implementation.name,
            is_ours=isinstance(implementation, Ours),
            forward_s=seconds["forward"],
            backward_s=seconds["backward"],
            note=note,
        )

    def measure_sdpa(self, case: GpuCase, backend: str) -> Measured:
        """A backend of SDPA; with keys and values repeated if it does not support GQA."""
        found = self.measure(case, Sdpa(backend))
        refused = found.forward_s is None and case.kv_share > 1 and found.note != LEFT_OUT
        return self.measure(case, Sdpa(backend, repeat=True)) if refused else found

    def ceilings(self, matrix: int = 8192, elements: int = 1 << 29) -> dict[str, float]:
        """TFLOP/s of a large bf16 matrix product, and TB/s of a copy (bytes read and written)."""
        a, b = (torch.randn(matrix, matrix, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        source = torch.randn(elements, device=self.device)
        target = torch.empty_like(source)
        return {
            "matmul_tflops": 2 * matrix**3 / self.timer(lambda: a @ b) / 1e12,
            "copy_tbytes_per_s": 2 * source.nbytes / self.timer(lambda: target.copy_(source)) / 1e12,
        }


def warm_up(device: torch.device, seconds: float = 0.5, matrix: int = 4096) -> None:
    """Multiply matrices for a while, so that the clocks have left their idle rate before the first measurement."""
    a = torch.randn(matrix, matrix, device=device, dtype=torch.bfloat16)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def cases(lengths: Sequence[int]) -> Iterator[GpuCase]:
    """All cases, in the order of the lengths; D = 128 first."""
    for seq_length in lengths:
        for head_dim in (128, 64):
            for causal in (True, False):
                for kv_share in (1, 4):
                    yield GpuCase(seq_length=seq_length, head_dim=head_dim, causal=causal, kv_share=kv_share)


def run(
    benchmark: Benchmark,
    shapes: Sequence[GpuCase],
    ours: Ours,
    compiled: GpuImplementation,
    progress: Callable[[list[Measured]], None],
) -> list[Measured]:
    """Measure the implementations of a case one after another, so that disturbances affect all of them.

    The compiled one comes last: its compilations take longer than everything else.
    """
    results: list[Measured] = []
    ring, alone = replace(ours, blocks=RING_STEPS), replace(ours, is_alone=True)
    for case in shapes:
        results += [benchmark.measure(case, one) for one in (ours, alone, ring)]
        results += [benchmark.measure_sdpa(case, backend) for backend in BACKENDS]
        progress(results)
    for case in shapes:
        results.append(benchmark.measure(case, compiled))
        progress(results)
    return results


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 if all of our cases ran, 1 if one failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="megatron_lightseq.tools.bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.md")
    parser.add_argument("--seq-lengths", type=int, nargs="+", default=SEQ_LENGTHS)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="start nothing new after this time"
    )
    parser.add_argument("--commit", default="unknown", help="commit to name in the report")
    parser.add_argument(
        "--checks",
        nargs="*",
        default=[],
        metavar="NAME=VERDICT",
        help="results of earlier checks, for the report",
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "megatron_lightseq.tools.bench.gpu: torch finds no GPU, so there is nothing to measure.",
            file=sys.stderr,
        )
        return 2
    benchmark = Benchmark(device=torch.device("cuda"), end=time.monotonic() + options.seconds)
    warm_up(benchmark.device)
    report = Report(
        environment=environment(options.commit), ceilings=benchmark.ceilings(), checks=tuple(options.checks)
    )

    def save(results: list[Measured]) -> None:
        report.environment["clock at the end"] = clock()
        write_report(report, results, options.out)

    results = run(benchmark, list(cases(options.seq_lengths)), Ours(CudaKernel()), Flex(), save)
    summary, _, _ = (options.out / "gpu.md").read_text().partition("| D |")
    print(f"{summary}Table: {options.out / 'gpu.md'}")
    return int(any(one.is_ours and one.note not in ("", LEFT_OUT) for one in results))


if __name__ == "__main__":
    sys.exit(main())
