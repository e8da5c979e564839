"""Times the CUDA kernels against torch's on the GPU at hand: ``python -m megatron_lightseq.bench.gpu --out DIR``.

Useful operations: forward 4 * B * H * S^2 * D, backward 10 * B * H * S^2 * D, half of it under a causal mask.
16k tokens in all and H * D = 2048, as in FlashAttention's papers. Medians of CUDA events after a warm-up, on random
data. Both ceilings are measured in the same run: a large matrix product and a device-to-device copy.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_lightseq.kernels.cuda import CudaKernel
from megatron_lightseq.kernels.registry import TileMask

TOKENS = 16384
WIDTH = 2048
RING_STEPS = 4
SEQ_LENGTHS = (2048, 4096, 8192, 16384, 32768)
BACKENDS = {"sdpa-cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa-flash": SDPBackend.FLASH_ATTENTION}
FAR = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuCase:
    """One shape: S tokens, H query heads, G key/value heads, B = max(1, 16k / S) sequences, bfloat16."""

    seq_length: int
    head_dim: int
    causal: bool
    kv_share: int
    """Query heads per key/value head: 1 is MHA."""

    @property
    def batch(self) -> int:
        return max(1, TOKENS // self.seq_length)

    @property
    def heads(self) -> int:
        return WIDTH // self.head_dim

    @property
    def forward_flops(self) -> float:
        whole = 4.0 * self.batch * self.heads * self.seq_length**2 * self.head_dim
        return whole / 2 if self.causal else whole

    @property
    def mask(self) -> TileMask:
        return TileMask(-FAR, 0 if self.causal else FAR)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, dout in Megatron's (S, B, H, D)."""

        def normal(heads: int) -> Tensor:
            shape = (self.seq_length, self.batch, heads, self.head_dim)
            return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

        groups = self.heads // self.kv_share
        return normal(self.heads), normal(groups), normal(groups), normal(self.heads)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One contender on one case; seconds are medians, None where it does not run."""

    case: GpuCase
    contender: str
    forward_s: float | None
    backward_s: float | None
    note: str = ""

    def tflops(self, direction: str) -> float | None:
        seconds = self.forward_s if direction == "forward" else self.backward_s
        factor = 1.0 if direction == "forward" else 2.5
        return None if seconds is None else factor * self.case.forward_flops / seconds / 1e12


def median_seconds(run: Callable[[], object], repetitions: int = 10) -> float:
    """Of one call, by CUDA events, after three calls of warm-up."""
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


def measure_ours(case: GpuCase, *, ring: bool = False) -> Measured:
    """Our kernel; its backward includes delta, zeroing the fp32 buffers and rounding them to bfloat16.

    ``ring`` cuts the keys into blocks that are merged through the accumulated state, as a ring of ranks does.
    """
    q, k, v, dout = case.tensors()
    kernel, scale = CudaKernel(), case.head_dim**-0.5
    out = torch.empty(q.shape, device="cuda")
    lse = torch.empty(case.batch, case.heads, case.seq_length, device="cuda")
    grads = [torch.empty(x.shape, device="cuda") for x in (q, k, v)]
    steps = RING_STEPS if ring else 1
    width = case.seq_length // steps

    def tiles() -> Iterator[tuple[slice, TileMask]]:
        for first in range(0, case.seq_length, width):
            yield slice(first, first + width), TileMask(case.mask.band_lo - first, case.mask.band_hi - first)

    def forward() -> None:
        for part, mask in tiles():
            state = {"mask": mask, "softmax_scale": scale, "accumulate": part.start > 0}
            kernel.forward(q, k[part], v[part], out, lse, **state)

    def backward() -> list[Tensor]:
        delta = (out * dout).sum(-1).permute(1, 2, 0).contiguous()
        for grad in grads:
            grad.zero_()
        for part, mask in tiles():
            targets = grads[0], grads[1][part], grads[2][part]
            kernel.backward(dout, q, k[part], v[part], lse, delta, *targets, mask=mask, softmax_scale=scale)
        return [grad.bfloat16() for grad in grads]

    return Measured(
        case=case,
        contender=f"ours, {steps} blocks" if ring else "ours",
        forward_s=median_seconds(forward),
        backward_s=median_seconds(backward),
    )


def measure_torch(case: GpuCase, contender: str) -> Measured:
    """One backend of scaled_dot_product_attention, or a note on why it does not run."""
    q, k, v, dout = (x.permute(1, 2, 0, 3).contiguous() for x in case.tensors())
    q, k, v = (x.requires_grad_() for x in (q, k, v))

    def forward() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=case.causal, enable_gqa=case.kv_share > 1
        )

    try:
        with sdpa_kernel(BACKENDS[contender]):
            with torch.no_grad():
                forward_s = median_seconds(forward)
            out = forward()
            backward_s = median_seconds(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))
    except RuntimeError as error:
        note = str(error).splitlines()[0][:120]
        return Measured(case=case, contender=contender, forward_s=None, backward_s=None, note=note)
    return Measured(case=case, contender=contender, forward_s=forward_s, backward_s=backward_s)


def ceilings() -> dict[str, float]:
    """TFLOP/s of a large bfloat16 matrix product, TB/s of a copy (bytes read and written)."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    return {
        "matmul_tflops": 2 * size**3 / median_seconds(lambda: a @ b) / 1e12,
        "copy_tbytes_per_s": 2 * source.nbytes / median_seconds(lambda: target.copy_(source)) / 1e12,
    }


def environment() -> dict[str, str]:
    """What the numbers depend on."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    return {
        "device": torch.cuda.get_device_name(),
        "capability": capability,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "python": platform.python_version(),
        "commit": commit or "unknown",
    }


def cases(lengths: tuple[int, ...]) -> Iterator[GpuCase]:
    for head_dim in (64, 128):
        for causal in (False, True):
            for kv_share in (1, 4):
                for seq_length in lengths:
                    yield GpuCase(seq_length=seq_length, head_dim=head_dim, causal=causal, kv_share=kv_share)


def table(results: list[Measured]) -> str:
    """Markdown: TFLOP/s, and the ratio of ours to torch's best in the same direction."""
    lines = [
        "| D | mask | heads | S | direction | contender | TFLOP/s | to torch's best |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in dict.fromkeys(one.case for one in results):
        mine = [one for one in results if one.case == case]
        for direction in ("forward", "backward"):
            rivals = [one.tflops(direction) or 0.0 for one in mine if one.contender in BACKENDS]
            best = max(rivals, default=0.0)
            for one in mine:
                rate = one.tflops(direction)
                ratio = f"{rate / best:.2f}" if rate and best else "-"
                heads = "MHA" if case.kv_share == 1 else f"GQA {case.kv_share}"
                shown = one.note if rate is None else f"{rate:.0f}"
                mask = "causal" if case.causal else "full"
                shape = (str(case.head_dim), mask, heads, str(case.seq_length))
                lines.append(f"| {' | '.join((*shape, direction, one.contender, shown, ratio))} |")
    return "\n".join(lines)


def run(lengths: tuple[int, ...]) -> list[Measured]:
    """Every case, contenders after one another so that what disturbs one disturbs all."""
    results = []
    for case in cases(lengths):
        results += [measure_ours(case), *(measure_torch(case, name) for name in BACKENDS)]
        if case.seq_length == TOKENS:
            results.append(measure_ours(case, ring=True))
    return results


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="megatron_lightseq.bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.md")
    parser.add_argument("--seq-lengths", type=int, nargs="+", default=SEQ_LENGTHS)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "megatron_lightseq.bench.gpu: torch sees no GPU here: there is nothing to time.", file=sys.stderr
        )
        return 2
    results, limits, machine = run(tuple(options.seq_lengths)), ceilings(), environment()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = [asdict(one) for one in results]
    report = {"environment": machine, "ceilings": limits, "results": rows}
    (options.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    head = "\n".join(f"- {name}: {value}" for name, value in {**machine, **limits}.items())
    text = f"{head}\n\n{table(results)}\n"
    (options.out / "gpu.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
