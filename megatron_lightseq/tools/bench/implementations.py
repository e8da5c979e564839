"""The attention implementations that the CPU benchmark compares, each in its preferred layout.

Shape letters: S = tokens, B = batch (1), H = query heads, G = key/value heads, D = head dim.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_lightseq.kernels.cpu import CpuKernel
from megatron_lightseq.kernels.delta import attention_delta
from megatron_lightseq.kernels.reference import ReferenceKernel, visible
from megatron_lightseq.kernels.registry import Kernel, accumulator_dtype
from megatron_lightseq.tools.bench.cases import KernelCase

Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Inputs:
    """q and dout (S, 1, H, D); k and v (S, 1, G, D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @staticmethod
    def random(case: KernelCase, seed: int = 0) -> Inputs:
        """Standard normal values, the same for every implementation."""
        generator = torch.Generator().manual_seed(seed)
        heads = (case.num_heads, case.num_kv_heads, case.num_kv_heads, case.num_heads)
        shapes = [(case.seq_length, 1, count, case.head_dim) for count in heads]
        return Inputs(*(torch.randn(shape, generator=generator).to(case.dtype) for shape in shapes))


class Implementation(Protocol):
    """One way to compute attention: first forward, then backward for the same inputs."""

    name: str

    def forward(self) -> None:
        """Compute the output."""

    def backward(self) -> None:
        """Compute the gradients, in the inputs' dtype."""

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """out, dq, dk, dv in (S, 1, heads, D)."""


class TileKernel:
    """A kernel of this package, called as one rank calls it, including delta and casts.

    Results are rounded to the inputs' dtype by the kernel if it can do that, and otherwise by torch.
    """

    def __init__(self, kernel: Kernel, case: KernelCase, inputs: Inputs) -> None:
        self.name = kernel.name
        self._kernel, self._inputs = kernel, inputs
        self._options: dict[str, Any] = {
            "mask": case.tile_mask(),
            "softmax_scale": case.head_dim**-0.5,
            "accumulate": False,
        }
        self._sums = accumulator_dtype(inputs.q.dtype)
        self._dtype = inputs.q.dtype if kernel.rounds_results else self._sums

    def forward(self) -> None:
        """One tile with all tokens."""
        x = self._inputs
        out = torch.empty((*x.q.shape[:3], x.v.shape[3]), dtype=self._dtype)
        self._lse = torch.empty(1, x.q.shape[2], x.q.shape[0], dtype=self._sums)
        self._kernel.forward(x.q, x.k, x.v, out, self._lse, **self._options)
        self._out = out.to(x.q.dtype)

    def backward(self) -> None:
        """Compute delta, then one tile."""
        x = self._inputs
        delta = attention_delta(self._out, x.dout)
        gradients = [torch.empty(tensor.shape, dtype=self._dtype) for tensor in (x.q, x.k, x.v)]
        self._kernel.backward(x.dout, x.q, x.k, x.v, self._lse, delta, *gradients, **self._options)
        self._gradients = [gradient.to(x.q.dtype) for gradient in gradients]

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As in :class:`Implementation`."""
        dq, dk, dv = self._gradients
        return self._out, dq, dk, dv


class TorchSdpa:
    """torch's fused attention in its own layout (1, heads, S, D).

    Full and causal masks use its flash kernel; windows and documents of equal length need a dense mask; short documents
    are faster in a loop over the documents, so a loop is used.
    """

    name = "torch"

    def __init__(self, case: KernelCase, inputs: Inputs) -> None:
        self._causal = case.mask_kind in ("causal", "short documents")
        self._grouped = case.num_kv_heads != case.num_heads
        self._dense: Tensor | None = None
        if case.mask_kind in ("window", "documents"):
            self._dense = visible(case.tile_mask(), case.seq_length, case.seq_length, torch.device("cpu"))
        bounds = case.cu_seqlens() if case.mask_kind == "short documents" else (0, case.seq_length)
        # Every document has separate tensors: gradients of slices would add to torch's time.
        self._pieces = [
            [
                x[start:end].permute(1, 2, 0, 3).contiguous()
                for x in (inputs.q, inputs.k, inputs.v, inputs.dout)
            ]
            for start, end in itertools.pairwise(bounds)
        ]
        for q, k, v, _ in self._pieces:
            for leaf in (q, k, v):
                leaf.requires_grad_()

    def forward(self) -> None:
        """Compute all pieces."""
        self._outs = [self._attend(q, k, v) for q, k, v, _ in self._pieces]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = scaled_dot_product_attention(
            q, k, v, attn_mask=self._dense, is_causal=self._causal, enable_gqa=self._grouped
        )
        return out

    def backward(self) -> None:
        """Compute the gradients of all pieces with autograd."""
        self._gradients = [
            torch.autograd.grad(out, piece[:3], piece[3])
            for out, piece in zip(self._outs, self._pieces, strict=True)
        ]

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As in :class:`Implementation`."""
        pieces = [(out.detach(), *grads) for out, grads in zip(self._outs, self._gradients, strict=True)]
        out, dq, dk, dv = (torch.cat(parts, 2).permute(2, 0, 1, 3) for parts in zip(*pieces, strict=True))
        return out, dq, dk, dv


def implementations(case: KernelCase, inputs: Inputs) -> list[Implementation]:
    """Ours and torch's."""
    return [TileKernel(CpuKernel(), case, inputs), TorchSdpa(case, inputs)]


def exact_results(case: KernelCase, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, dq, dk and dv by the textbook formulas in fp64."""
    wide = Inputs(*(x.double() for x in (inputs.q, inputs.k, inputs.v, inputs.dout)))
    exact = TileKernel(ReferenceKernel(), case, wide)
    exact.forward()
    exact.backward()
    return exact.results()
