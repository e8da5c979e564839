"""One small tile of every kernel on the GPU, for compute-sanitizer and as a first sign of life (scripts/gpu_check.sh).

``python -m tests.cuda.sanitized`` prints before and after each kernel, so that its last line names one that hangs.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from megatron_lightseq.kernels.cuda import HEAD_DIMS, CudaKernel
from megatron_lightseq.kernels.registry import Kernel
from tests.kernels.oracle import Case, inputs

Around = Callable[[str], AbstractContextManager[object]]


def run_tiles(
    kernel: Callable[[bool], Kernel],
    device: str,
    around: Around = nullcontext,
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16),
) -> None:
    """Runs every head dim, forward and backward, with and without determinism and softcap.

    ``kernel`` takes ``deterministic``. ``around`` is given a description of each kernel and returns a context for it.
    """
    for head_dim, value_dim in HEAD_DIMS:
        for dtype in dtypes:
            for softcap in (0.0, 20.0):
                case = Case(
                    queries=70,
                    keys=150,
                    head_dim=head_dim,
                    value_dim=value_dim,
                    band_hi=80,
                    softcap=softcap,
                )
                name = f"{dtype}, D = {head_dim}, Dv = {value_dim}{', softcap' * bool(softcap)}"
                run_tile(case, dtype, kernel, device, lambda what, name=name: around(f"{what}, {name}"))


def run_tile(
    case: Case, dtype: torch.dtype, kernel: Callable[[bool], Kernel], device: str, around: Around
) -> None:
    """Both directions of one tile."""
    q, k, v, dout = (x.to(device) for x in inputs(case, dtype))
    out = torch.zeros(dout.shape, device=device)
    lse, delta = torch.zeros(2, case.batch, case.heads, case.queries, device=device)
    with around("forward"):
        for accumulate in (False, True):
            kernel(False).forward(q, k, v, out, lse, accumulate=accumulate, **case.options())
    for deterministic in (False, True):
        grads = [torch.zeros(x.shape, device=device) for x in (q, k, v)]
        with around("backward" + ", deterministic" * deterministic):
            kernel(deterministic).backward(dout, q, k, v, lse, delta, *grads, **case.options())


@contextmanager
def announced(what: str) -> Iterator[None]:
    """Prints what starts, and that it ran. A slower kernel that took its place is an error."""
    print(f"{what} ...", end=" ", flush=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield
    torch.cuda.synchronize()
    print("ran", flush=True)


def main(arguments: list[str]) -> None:
    """``--one-dtype``: bfloat16 only."""
    dtypes = (torch.bfloat16,) if arguments == ["--one-dtype"] else (torch.bfloat16, torch.float16)
    run_tiles(CudaKernel, "cuda", announced, dtypes)
    print("every kernel ran")


if __name__ == "__main__":
    main(sys.argv[1:])
