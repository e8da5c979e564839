"""One small tile of every kernel on the GPU, for compute-sanitizer. Started by scripts/gpu_check.sh."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_lightseq.kernels.cuda import HEAD_DIMS, CudaKernel
from megatron_lightseq.kernels.registry import Kernel
from tests.kernels.oracle import Case, inputs


def run_tiles(
    kernel: Callable[[bool], Kernel], device: str, done: Callable[[str], object] = lambda _: None
) -> None:
    """Runs every head dim and dtype, forward and backward, with and without determinism.

    ``kernel`` takes ``deterministic``. ``done`` is called with a description of each tile that was started.
    """
    for head_dim, value_dim in HEAD_DIMS:
        case = Case(
            queries=70, keys=150, heads=2, groups=1, head_dim=head_dim, value_dim=value_dim, band_hi=80
        )
        for dtype in (torch.bfloat16, torch.float16):
            q, k, v, dout = (x.to(device) for x in inputs(case, dtype))
            out = torch.zeros(dout.shape, device=device)
            lse, delta = torch.zeros(2, 1, 2, 70, device=device)
            options = {"mask": case.mask(), "softmax_scale": case.softmax_scale}
            for accumulate in (False, True):
                kernel(False).forward(q, k, v, out, lse, accumulate=accumulate, **options)
            done(f"forward, {dtype}, D = {head_dim}, Dv = {value_dim}")
            for deterministic in (False, True):
                grads = [torch.zeros(x.shape, device=device) for x in (q, k, v)]
                kernel(deterministic).backward(dout, q, k, v, lse, delta, *grads, **options)
            done(f"backward, {dtype}, D = {head_dim}, Dv = {value_dim}")


def ran(what: str) -> None:
    torch.cuda.synchronize()
    print(f"{what}: ran")


def main() -> None:
    run_tiles(CudaKernel, "cuda", ran)
    print("every kernel ran")


if __name__ == "__main__":
    main()
