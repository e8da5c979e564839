"""delta, the row sums of ``out * dout``, which the backward of attention needs first."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lightseq.kernels.cuda import delta_on_gpu
from megatron_lightseq.kernels.extension import missing_extension
from megatron_lightseq.kernels.registry import accumulator_dtype, dtype_name
from megatron_lightseq.kernels.specs import KERNELS


def attention_delta(out: Tensor, dout: Tensor) -> Tensor:
    """The sums of ``out * dout`` over Dv. Not differentiable.

    On CPUs and on GPUs with the compiled CUDA kernels, a compiled kernel reads both tensors once. Inputs that it does
    not take are left to torch, which makes copies in the accumulator dtype.

    Args:
        out: (S, B, H, Dv), the attention's output, in the dtype of the inputs or of the accumulator.
        dout: (S, B, H, Dv), its gradient, in either dtype.

    Returns:
        (B, H, S), contiguous, in the accumulator dtype.
    """
    fused = delta_on_gpu(out, dout) if out.device.type == dout.device.type == "cuda" else None
    if fused is not None:
        return fused
    if not (_is_fusible(out) and _is_fusible(dout)) or missing_extension() is not None:
        acc = accumulator_dtype(torch.promote_types(out.dtype, dout.dtype))
        return (out.to(acc) * dout).sum(-1).permute(1, 2, 0).contiguous()
    delta = torch.empty((out.shape[1], out.shape[2], out.shape[0]), dtype=torch.float32)
    torch.ops.mls.attention_delta(out, dout, delta)
    return delta


def _is_fusible(x: Tensor) -> bool:
    """Whether the compiled kernel takes ``x``; not for broadcast gradients, as of ``sum()``: their last stride is 0."""
    contiguous = x.shape[-1] == 1 or x.stride(-1) == 1
    refusal = KERNELS["cpu"].refusal(device_type=x.device.type, dtype=dtype_name(x.dtype))
    return contiguous and refusal is None
