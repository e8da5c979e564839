"""One small tile of every kernel on the GPU, for compute-sanitizer. Started by scripts/gpu_check.sh."""

from __future__ import annotations

import torch

from megatron_lightseq.kernels.cuda import HEAD_DIMS, CudaKernel
from tests.kernels.oracle import Case, inputs


def main() -> None:
    for head_dim, value_dim in HEAD_DIMS:
        case = Case(
            queries=70, keys=150, heads=2, groups=1, head_dim=head_dim, value_dim=value_dim, band_hi=80
        )
        q, k, v, dout = (x.cuda() for x in inputs(case, torch.bfloat16))
        out = torch.zeros(*dout.shape, device="cuda")
        lse, delta = torch.zeros(2, 1, 2, 70, device="cuda")
        options = {"mask": case.mask(), "softmax_scale": case.softmax_scale}
        for accumulate in (False, True):
            CudaKernel().forward(q, k, v, out, lse, accumulate=accumulate, **options)
        for deterministic in (False, True):
            grads = [torch.zeros(x.shape, device="cuda") for x in (q, k, v)]
            CudaKernel(deterministic).backward(dout, q, k, v, lse, delta, *grads, **options)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
