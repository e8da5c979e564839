"""A kernel for CPU tensors that computes on another device, so that gloo ranks can share one GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from megatron_lightseq.kernels.registry import Kernel
from megatron_lightseq.kernels.tile_mask import TileMask


@dataclass
class StagedKernel:
    """Copies every tile to ``device``, runs ``kernel`` there, and copies the results back."""

    kernel: Kernel
    device: str = "cuda"
    name: str = "staged"
    rounds_results: bool = False

    def unsupported(self, q: Tensor, k: Tensor, v: Tensor) -> str | None:
        return None

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
        staged = [self._there(x) for x in (q, k, v, out, lse)]
        options = {
            "mask": self._mask(mask),
            "softmax_scale": softmax_scale,
            "accumulate": accumulate,
            "softcap": softcap,
        }
        self.kernel.forward(*staged, **options)
        out.copy_(staged[3])
        lse.copy_(staged[4])

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
        staged = [self._there(x) for x in (dout, q, k, v, lse, delta, dq, dk, dv)]
        options = {
            "mask": self._mask(mask),
            "softmax_scale": softmax_scale,
            "accumulate": accumulate,
            "softcap": softcap,
        }
        self.kernel.backward(*staged, **options)
        for target, grad in zip((dq, dk, dv), staged[6:], strict=True):
            target.copy_(grad)

    def _there(self, x: Tensor) -> Tensor:
        return x.to(self.device, copy=True)

    def _mask(self, mask: TileMask) -> TileMask:
        return mask if mask.key_ranges is None else replace(mask, key_ranges=self._there(mask.key_ranges))
