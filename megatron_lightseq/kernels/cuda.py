"""The fused CUDA kernels (csrc/cuda): blockwise online softmax on tensor cores, fp32 accumulation."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_lightseq.kernels.extension import BUILD_COMMAND, load_extension, missing_extension
from megatron_lightseq.kernels.registry import refusal_of
from megatron_lightseq.kernels.specs import CUDA_HEAD_DIMS as HEAD_DIMS
from megatron_lightseq.kernels.specs import KERNELS
from megatron_lightseq.kernels.tile_mask import TileMask

__all__ = [
    "HEAD_DIMS",
    "CudaKernel",
    "GradientTargets",
    "cannot_run",
    "delta_on_gpu",
    "head_parts",
    "missing_cuda",
    "runs_on",
]

SMALL_HEAD_DIM = 64
"""The kernels for this head dim also fit 8.6, 8.9 and 12.x, whose multiprocessors have 100 KiB of shared memory."""
SHARED_MEMORY = 164 << 10
"""Bytes of shared memory per multiprocessor that the kernels of the other head dims need: what 8.0 has."""
INPUT_ALIGNMENT = 16
"""Bytes: the kernels copy inputs in pieces of this size."""
BLOCK_KEYS = 128
"""Number of keys per block of the Hopper backward kernels."""
LONGEST_LAUNCH = 1 << 18
"""Maximum queries per launch of the Hopper backward kernels; more need several launches, which add up dk and dv."""
DELTA_LONGEST_ROW = 256
"""Maximum length of a row for the delta kernel."""


class CudaKernel:
    """bfloat16 and float16 on compute capability 8.0 and later; skips masked tiles.

    Hopper (9.0) has specialised kernels. Later GPUs run the kernels for 8.0, which the driver compiles for them from
    PTX at the first call and then caches.

    Runs on the current stream of the tensors' device and never synchronises, so that it can be captured in a CUDA
    graph. It allocates memory for copies of misaligned inputs and, in backward, for fp32 sums of gradients that blocks
    add to atomically and that are rounded at the end.

    Args:
        deterministic: compute gradients without atomic additions, so that they are bitwise reproducible, at 7
            matrix products per tile instead of 5. None: follow ``torch.are_deterministic_algorithms_enabled()`` at the
            time of the call. Otherwise dq is summed in no fixed order, and so are dk and dv where several blocks
            share the query heads of one key/value head. Forward is always reproducible.
    """

    spec = KERNELS["cuda"]
    name = spec.name
    rounds_results = True

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
        softcap: float = 0.0,
    ) -> None:
        """Merge one tile into ``(out, lse)``, or overwrite them. Shapes as in :class:`~.registry.Kernel`.

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
                softcap=softcap,
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
        softcap: float = 0.0,
    ) -> None:
        """Add the tile's gradients to ``dq, dk, dv``, or overwrite them. Shapes as in :class:`~.registry.Kernel`.

        Raises:
            UnsupportedError: the compiled kernels were not built.
            RuntimeError: a shape, dtype, device or stride breaks the rule that the message names.
        """
        load_extension(self.name)
        wanted = self.deterministic
        deterministic = torch.are_deterministic_algorithms_enabled() if wanted is None else wanted
        parts = 1 if deterministic else _head_parts_on(q.device, q, k)
        with torch.cuda.device(q.device):
            targets = GradientTargets.prepare(
                (dq, dk, dv),
                accumulate=accumulate,
                deterministic=deterministic,
                parts=parts,
                is_one_launch=q.shape[0] <= LONGEST_LAUNCH,
            )
            torch.ops.mls.attention_backward(
                _aligned(dout),
                _aligned(q),
                _aligned(k),
                _aligned(v),
                lse,
                delta,
                *targets.written,
                mask.band_lo,
                mask.band_hi,
                mask.key_ranges,
                softmax_scale,
                accumulate,
                torch.cuda.current_stream().cuda_stream,
                deterministic,
                parts,
                softcap=softcap,
            )
            targets.finish()
        _warn_of_fallback()


@dataclass(frozen=True, slots=True)
class GradientTargets:
    """Where the compiled backward writes: to the results, or to fp32 sums that are rounded to them afterwards."""

    results: tuple[Tensor, Tensor, Tensor]
    """dq, dk and dv of the call."""
    written: tuple[Tensor, Tensor, Tensor]
    """What the compiled kernels take in their place; the same tensors wherever possible."""

    @staticmethod
    def prepare(
        results: tuple[Tensor, Tensor, Tensor],
        *,
        accumulate: bool,
        deterministic: bool,
        parts: int,
        is_one_launch: bool,
    ) -> GradientTargets:
        """Targets of a call, zeroed if they are overwritten but blocks add to them, as csrc/cuda/run.h requires.

        Args:
            results: dq, dk and dv, uninitialised unless ``accumulate``.
            accumulate: whether the call adds to ``results``, which are then fp32.
            deterministic: whether the kernels avoid atomic additions.
            parts: see :func:`head_parts`.
            is_one_launch: False if several launches add up dk and dv.
        """
        if accumulate:
            return GradientTargets(results, results)
        dq, dk, dv = results
        is_empty = 0 in (*dq.shape[:2], dk.shape[0])  # nothing is launched then
        adds_keys = parts > 1 or is_empty
        dq_written = _zeros_for(dq) if not deterministic or is_empty else dq
        dk_written, dv_written = (_zeros_for(x) if adds_keys else x for x in (dk, dv))
        if not is_one_launch and not adds_keys:
            dk_written, dv_written = (_sums_for(x) for x in (dk, dv))
        return GradientTargets(results, (dq_written, dk_written, dv_written))

    def finish(self) -> None:
        """Round the sums to the results."""
        for result, written in zip(self.results, self.written, strict=True):
            if written is not result:
                result.copy_(written)


def _zeros_for(result: Tensor) -> Tensor:
    return _sums_for(result).zero_()


def _sums_for(result: Tensor) -> Tensor:
    """The result itself if it is fp32, otherwise uninitialised fp32 sums for it."""
    if result.dtype == torch.float32:
        return result
    return torch.empty(result.shape, dtype=torch.float32, device=result.device)


def head_parts(
    num_keys: int, batch: int, num_kv_heads: int, heads_per_group: int, multiprocessors: int
) -> int:
    """How many blocks share the query heads of one key/value head in Hopper's backward: a divisor of their number.

    One block for all of them needs no atomic additions to dk and dv. If that leaves multiprocessors idle, as with
    one key/value head per rank, several blocks share them, up to two blocks per multiprocessor.
    """
    blocks = -(-num_keys // BLOCK_KEYS) * num_kv_heads * batch
    for parts in range(1, heads_per_group):
        if heads_per_group % parts == 0 and blocks * parts >= 2 * multiprocessors:
            return parts
    return heads_per_group


def _head_parts_on(device: torch.device, q: Tensor, k: Tensor) -> int:
    properties = torch.cuda.get_device_properties(device)
    if (properties.major, properties.minor) != (9, 0):
        return 1
    num_keys, batch, num_kv_heads = k.shape[:3]
    return head_parts(
        num_keys, batch, num_kv_heads, q.shape[2] // num_kv_heads, properties.multi_processor_count
    )


def delta_on_gpu(out: Tensor, dout: Tensor) -> Tensor | None:
    """The sums of ``out * dout`` over Dv in fp32, (B, H, S), by one compiled kernel; None if it does not take these.

    Args:
        out: (S, B, H, Dv) on a CUDA device, in dout's dtype or fp32.
        dout: (S, B, H, Dv), bfloat16 or float16.
    """
    if missing_cuda() is not None or not _suits_delta(out, dout):
        return None
    properties = torch.cuda.get_device_properties(out.device)
    if cannot_run(properties, str(load_extension("cuda").cuda_archs), SMALL_HEAD_DIM) is not None:
        return None
    delta = torch.empty((out.shape[1], out.shape[2], out.shape[0]), dtype=torch.float32, device=out.device)
    with torch.cuda.device(out.device):
        torch.ops.mls.attention_delta(out, dout, delta, torch.cuda.current_stream().cuda_stream)
    return delta


def _suits_delta(out: Tensor, dout: Tensor) -> bool:
    value_dim = out.shape[-1]
    return (
        dout.dtype in (torch.bfloat16, torch.float16)
        and out.dtype in (dout.dtype, torch.float32)
        and 0 < value_dim <= DELTA_LONGEST_ROW
        and value_dim % 8 == 0
        and out.numel() // value_dim < 1 << 31
        and _is_aligned(out)
        and _is_aligned(dout)
    )


def missing_cuda() -> str | None:
    """Why the compiled extension has no CUDA kernels, with the command that builds them; None if it has them."""
    missing = missing_extension()
    if missing is not None:
        return missing
    if load_extension().with_cuda:
        return None
    return (
        "the compiled kernels were built without CUDA, because nvcc was not found or MLS_CUDA was 0 "
        f"(install the CUDA toolkit and rebuild: MLS_CUDA=1 {BUILD_COMMAND})"
    )


class DeviceProperties(Protocol):
    """The part of ``torch.cuda.get_device_properties`` that :func:`cannot_run` reads."""

    name: str
    major: int
    minor: int
    shared_memory_per_multiprocessor: int


def cannot_run(device: DeviceProperties, archs: str, head_dim: int) -> str | None:
    """Why a build for ``archs`` (MLS_CUDA_ARCHS of setup.py) has no kernel for this GPU, or None."""
    capability, name = (device.major, device.minor), f"{device.name} has {device.major}.{device.minor}"
    if capability < (8, 0):
        return f"it needs compute capability 8.0, {name}"
    if not any(runs_on(arch, capability) for arch in archs.split(";")):
        return (
            f"the compiled kernels were built for compute capabilities {archs}, {name} "
            f"(rebuild them: MLS_CUDA_ARCHS='80+PTX;90a' {BUILD_COMMAND})"
        )
    memory = device.shared_memory_per_multiprocessor
    if head_dim > SMALL_HEAD_DIM and memory < SHARED_MEMORY:
        return (
            f"head dims above {SMALL_HEAD_DIM} need {SHARED_MEMORY >> 10} KiB of shared memory per multiprocessor, "
            f"{device.name} has {memory >> 10}"
        )
    return None


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code built for ``arch`` (one item of MLS_CUDA_ARCHS) runs on a compute capability.

    Native code also runs on later minor versions of the same major version, unless its name ends in ``a``; PTX runs
    on all later versions.
    """
    number, ptx, _ = arch.partition("+PTX")
    built = divmod(int(number.rstrip("af")), 10)
    if number.endswith("a"):
        return built == capability
    return built <= capability and (bool(ptx) or built[0] == capability[0])


def _warn_of_fallback() -> None:
    """Warn, once per kernel, if the Hopper kernel could not be launched and a slower one ran instead."""
    if torch.compiler.is_compiling():
        return
    reason = load_extension("cuda").cuda_fallback()
    if reason is not None:
        warnings.warn(reason, RuntimeWarning, stacklevel=3)


def _aligned(x: Tensor) -> Tensor:
    """x, or a contiguous copy if its strides or its address are not aligned as the kernels require."""
    return x if _is_aligned(x) else x.clone(memory_format=torch.contiguous_format)


def _is_aligned(x: Tensor) -> bool:
    """Whether the kernels can read x without a copy.

    Not if a dimension is expanded (stride 0): CUDA does not document whether the tensor maps of Hopper's kernels may
    have such dimensions.
    """
    step = INPUT_ALIGNMENT // x.element_size()
    outer = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    strides_fit = all(stride % step == 0 and (stride != 0 or size == 1) for size, stride in outer)
    return strides_fit and x.stride(-1) == 1 and x.data_ptr() % INPUT_ALIGNMENT == 0
