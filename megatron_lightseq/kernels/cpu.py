"""The fused C++ kernel for CPUs (csrc/cpu): blockwise online softmax, fp32 accumulation, no S x S matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_lightseq.kernels.extension import load_extension, missing_extension
from megatron_lightseq.kernels.registry import refusal_of
from megatron_lightseq.kernels.specs import KERNELS
from megatron_lightseq.kernels.tile_mask import TileMask


class CpuKernel:
    """float32 and bfloat16, any head dims and lengths, grouped heads; skips masked keys.

    Results are bitwise reproducible on any number of threads (``torch.set_num_threads``).
    """

    spec = KERNELS["cpu"]
    name = spec.name
    rounds_results = True

    @property
    def isa(self) -> str:
        """The instruction-set variant in use, e.g. ``avx512``; the environment variable MLS_CPU_ISA overrides it.

        Raises:
            UnsupportedError: the compiled kernels were not built.
        """
        return str(load_extension().cpu_isa)

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        """Why this kernel cannot take these inputs, or None."""
        return refusal_of(self.spec, q, k, v) or missing_extension()

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
        load_extension()
        keys = (mask.band_lo, mask.band_hi, mask.key_ranges)
        torch.ops.mls.attention_forward(q, k, v, out, lse, *keys, softmax_scale, accumulate, softcap=softcap)

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
        load_extension()
        tensors = (dout, q, k, v, lse, delta, dq, dk, dv)
        keys = (mask.band_lo, mask.band_hi, mask.key_ranges)
        torch.ops.mls.attention_backward(*tensors, *keys, softmax_scale, accumulate, softcap=softcap)
