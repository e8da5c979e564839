"""delta, the row sums of ``out * dout`` that every backward of attention starts with."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lightseq.kernels.extension import missing_extension
from megatron_lightseq.kernels.registry import accumulator_dtype, dtype_name
from megatron_lightseq.kernels.specs import KERNELS


def attention_delta(out: Tensor, dout: Tensor) -> Tensor:
    """(B, H, S), contiguous, in the accumulator dtype: the sums of ``out * dout`` over Dv.

    On CPUs the compiled kernels read both once; what they do not take, torch computes, with copies of both in
    the accumulator dtype. Not differentiable.

    Args:
        out: (S, B, H, Dv), the attention's output, in the inputs' dtype or in the accumulator's.
        dout: (S, B, H, Dv), its gradient, in either.
    """
    if not (_is_fusible(out) and _is_fusible(dout)) or missing_extension() is not None:
        acc = accumulator_dtype(torch.promote_types(out.dtype, dout.dtype))
        return (out.to(acc) * dout).sum(-1).permute(1, 2, 0).contiguous()
    delta = torch.empty((out.shape[1], out.shape[2], out.shape[0]), dtype=torch.float32)
    torch.ops.mls.attention_delta(out, dout, delta)
    return delta


def _is_fusible(x: Tensor) -> bool:
    """Whether the compiled kernels take ``x``. Broadcast gradients (of ``.sum()``) have a last stride of 0: False."""
    contiguous = x.shape[-1] == 1 or x.stride(-1) == 1
    refusal = KERNELS["cpu"].refusal(device_type=x.device.type, dtype=dtype_name(x.dtype))
    return contiguous and refusal is None
