"""The fused CUDA kernels (csrc/cuda): blockwise online softmax on tensor cores, fp32 accumulation."""

from __future__ import annotations

import warnings
from typing import Protocol

import torch
from torch import Tensor

from megatron_lightseq.kernels.adapters import begin_gradients
from megatron_lightseq.kernels.extension import BUILD_COMMAND, load_extension, missing_extension
from megatron_lightseq.kernels.registry import refusal_of
from megatron_lightseq.kernels.specs import CUDA_HEAD_DIMS as HEAD_DIMS
from megatron_lightseq.kernels.specs import KERNELS
from megatron_lightseq.kernels.tile_mask import TileMask

__all__ = ["HEAD_DIMS", "CudaKernel", "cannot_run", "missing_cuda", "runs_on"]

SMALL_HEAD_DIM = 64
"""The kernels of this head dim run on 8.6, 8.9 and 12.x too, whose multiprocessors have 100 KiB of shared memory."""
SHARED_MEMORY = 164 << 10
"""Bytes a multiprocessor that the others were made for: what 8.0 has."""
INPUT_ALIGNMENT = 16
"""Bytes: the kernels copy inputs in pieces of this size."""


class CudaKernel:
    """bfloat16 and float16 on compute capability 8.0 and later; masked tiles are skipped, not computed.

    Hopper (9.0) has kernels of its own. GPUs later than that run those of 8.0, which the driver compiles for them
    from PTX at the first call and then caches.

    Runs on the current stream of the tensors' device, allocates nothing (unless an input is misaligned, which is
    then copied) and never waits for the GPU, so that it can be captured in a CUDA graph.

    Args:
        deterministic: compute dq without atomic additions, so that gradients repeat bit for bit, at 7 matrix
            products a tile in place of 5. None: as ``torch.are_deterministic_algorithms_enabled()`` says at the
            time of the call. Forward, dk and dv are always repeatable.
    """

    spec = KERNELS["cuda"]
    name = spec.name
    rounds_results = False

    def __init__(self, deterministic: bool | None = None) -> None:
        self.deterministic = deterministic

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """Why this kernel cannot take these inputs, or None."""
        reason = refusal_of(self.spec, q, k, v) or missing_cuda()
        if reason is not None:
            return reason
        properties = torch.cuda.get_device_properties(q.device)
        return cannot_run(properties, str(load_extension(self.name).cuda_archs), q.shape[-1])

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        mask: TileMask,
        softmax_scale: float,
        accumulate: bool,
    ) -> None:
        """Merge one tile into ``(out, lse)`` in place. Shapes as in :class:`~.registry.Kernel`.

        Raises:
            UnsupportedError: the compiled kernels were not built.
            RuntimeError: a shape, dtype, device or stride breaks the rule that the message names.
        """
        load_extension(self.name)
        q, k, v = _aligned(q), _aligned(k), _aligned(v)
        with torch.cuda.device(q.device):
            torch.ops.mls.attention_forward(
                q,
                k,
                v,
                out,
                lse,
                mask.band_lo,
                mask.band_hi,
                mask.key_ranges,
                softmax_scale,
                accumulate,
                torch.cuda.current_stream().cuda_stream,
            )
        _warn_of_fallback()

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        delta: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        *,
        mask: TileMask,
        softmax_scale: float,
        accumulate: bool = True,
    ) -> None:
        """Add the tile's gradients to ``dq, dk, dv``, or write them there. Shapes as in :class:`~.registry.Kernel`.

        Raises:
            UnsupportedError: the compiled kernels were not built.
            RuntimeError: a shape, dtype, device or stride breaks the rule that the message names.
        """
        load_extension(self.name)
        begin_gradients((dq, dk, dv), accumulate=accumulate)  # the compiled kernels only add
        wanted = self.deterministic
        with torch.cuda.device(q.device):
            torch.ops.mls.attention_backward(
                _aligned(dout),
                _aligned(q),
                _aligned(k),
                _aligned(v),
                lse,
                delta,
                dq,
                dk,
                dv,
                mask.band_lo,
                mask.band_hi,
                mask.key_ranges,
                softmax_scale,
                True,
                torch.cuda.current_stream().cuda_stream,
                torch.are_deterministic_algorithms_enabled() if wanted is None else wanted,
            )
        _warn_of_fallback()


def missing_cuda() -> str | None:
    """Why the compiled kernels hold no CUDA part, with the command that builds it; None when they do."""
    missing = missing_extension()
    if missing is not None:
        return missing
    if load_extension().with_cuda:
        return None
    return (
        "the compiled kernels were built without CUDA, because nvcc was not found or not wanted "
        f"(build them again with the CUDA toolkit installed: MLS_CUDA=1 {BUILD_COMMAND})"
    )


class DeviceProperties(Protocol):
    """What is read of ``torch.cuda.get_device_properties``."""

    name: str
    major: int
    minor: int
    shared_memory_per_multiprocessor: int


def cannot_run(device: DeviceProperties, archs: str, head_dim: int) -> str | None:
    """Why a build for ``archs`` (setup.py's MLS_CUDA_ARCHS) has no kernel for a GPU, or None."""
    capability, name = (device.major, device.minor), f"{device.name} has {device.major}.{device.minor}"
    if capability < (8, 0):
        return f"it needs compute capability 8.0, {name}"
    if not any(runs_on(arch, capability) for arch in archs.split(";")):
        return (
            f"the compiled kernels were built for compute capabilities {archs}, {name} "
            f"(build them again: MLS_CUDA_ARCHS='80+PTX;90a' {BUILD_COMMAND})"
        )
    memory = device.shared_memory_per_multiprocessor
    if head_dim > SMALL_HEAD_DIM and memory < SHARED_MEMORY:
        return (
            f"head dims above {SMALL_HEAD_DIM} need {SHARED_MEMORY >> 10} KiB of shared memory a multiprocessor, "
            f"{device.name} has {memory >> 10}"
        )
    return None


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code built for ``arch`` (a part of setup.py's MLS_CUDA_ARCHS) runs on a compute capability.

    Native code serves later minor versions of its major version; that of an ``a`` only its own; PTX all later ones.
    """
    number, ptx, _ = arch.partition("+PTX")
    built = divmod(int(number.rstrip("af")), 10)
    if number.endswith("a"):
        return built == capability
    return built <= capability and (bool(ptx) or built[0] == capability[0])


def _warn_of_fallback() -> None:
    """Warn, once per kernel, when Hopper's own kernel could not be started and a slower one ran in its place."""
    if torch.compiler.is_compiling():
        return
    reason = load_extension("cuda").cuda_fallback()
    if reason is not None:
        warnings.warn(reason, RuntimeWarning, stacklevel=3)


def _aligned(x: Tensor) -> Tensor:
    """x, or a contiguous copy where its strides or its address do not suit the kernels' copies.

    Dimensions that are expanded (stride 0) are copied too: CUDA does not document whether the tensor maps of Hopper's
    kernels may have them.
    """
    step = INPUT_ALIGNMENT // x.element_size()
    outer = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    strides_fit = x.stride(-1) == 1 and all(
        stride % step == 0 and (stride != 0 or size == 1) for size, stride in outer
    )
    if strides_fit and x.data_ptr() % INPUT_ALIGNMENT == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)
