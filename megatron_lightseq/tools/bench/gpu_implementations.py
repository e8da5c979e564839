"""What the GPU benchmark compares: our kernel, torch's fused backends, and torch's Triton kernel (flex_attention).

Shape letters: S tokens, B batch, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._functorch import config as functorch
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.kernels.delta import attention_delta
from megatron_lightseq.kernels.registry import Kernel
from megatron_lightseq.kernels.tile_mask import TileMask

FAR = 1 << 30
BACKENDS = {"sdpa-cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa-flash": SDPBackend.FLASH_ATTENTION}
RING_STEPS = 4
FLEX_LONGEST = 16384
"""Largest number of tokens: building flex_attention's block masks needs S x S indices."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuCase:
    """One shape: S tokens, H = width / D query heads, B = max(1, tokens / S) sequences, bfloat16."""

    seq_length: int
    head_dim: int
    causal: bool
    kv_share: int
    """Query heads per key/value head; 1 for MHA."""
    tokens: int = 16384
    width: int = 2048

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return max(1, self.tokens // self.seq_length)

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.width // self.head_dim

    @property
    def forward_flops(self) -> float:
        """Useful operations of the forward pass; the backward pass has 2.5 times as many."""
        whole = 4.0 * self.batch * self.heads * self.seq_length**2 * self.head_dim
        return whole / 2 if self.causal else whole

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Random q, k, v, dout in Megatron's layout (S, B, H, D)."""

        def normal(heads: int) -> Tensor:
            shape = (self.seq_length, self.batch, heads, self.head_dim)
            return torch.randn(shape, device=device, dtype=torch.bfloat16)

        groups = self.heads // self.kv_share
        return normal(self.heads), normal(groups), normal(groups), normal(self.heads)


Tensors = tuple[Tensor, Tensor, Tensor, Tensor]
Call = Callable[[], object]


class GpuImplementation(Protocol):
    """One way to compute attention: returns the calls to be timed, for tensors from :meth:`GpuCase.tensors`."""

    @property
    def name(self) -> str:
        """For tables."""

    def settings(self) -> AbstractContextManager[Any]:
        """Context in which its calls are made and timed."""

    def forward(self, case: GpuCase, tensors: Tensors) -> Call:
        """The forward pass."""

    def backward(self, case: GpuCase, tensors: Tensors) -> Call:
        """The backward pass; the forward pass has already run."""


@dataclass(frozen=True, slots=True)
class Ours:
    """Our kernel in Megatron's layout, called as attention calls it: backward includes delta and all around the kernel.

    With ``blocks`` > 1 the keys are processed in blocks that are merged through the accumulated state, as on a ring of
    ranks. ``is_alone`` leaves out what surrounds the kernel: delta is given, and gradients are added to fp32 sums. The
    difference shows whether a slow call is a slow kernel.
    """

    kernel: Kernel
    blocks: int = 1
    is_alone: bool = False

    @property
    def name(self) -> str:
        """As in :class:`GpuImplementation`."""
        if self.is_alone:
            return "ours, kernel alone"
        return "ours" if self.blocks == 1 else f"ours, {self.blocks} blocks"

    def settings(self) -> AbstractContextManager[Any]:
        """As in :class:`GpuImplementation`."""
        return nullcontext()

    def _tiles(self, case: GpuCase) -> Iterator[tuple[slice, dict[str, Any]]]:
        width = case.seq_length // self.blocks
        for first in range(0, case.seq_length, width):
            mask = TileMask(-FAR - first, -first if case.causal else FAR)
            yield slice(first, first + width), {"mask": mask, "softmax_scale": case.head_dim**-0.5}

    @property
    def _is_final(self) -> bool:
        """Whether the kernel writes results in the dtype of the inputs."""
        return self.blocks == 1 and not self.is_alone and self.kernel.rounds_results

    def _result(self, x: Tensor) -> Tensor:
        return torch.empty(x.shape, device=x.device, dtype=x.dtype if self._is_final else torch.float32)

    def _forward(self, case: GpuCase, tensors: Tensors) -> Callable[[], tuple[Tensor, Tensor]]:
        q, k, v, dout = tensors
        out = self._result(dout)
        lse = torch.empty(case.batch, case.heads, case.seq_length, device=q.device)

        def call() -> tuple[Tensor, Tensor]:
            for part, options in self._tiles(case):
                self.kernel.forward(q, k[part], v[part], out, lse, accumulate=part.start > 0, **options)
            return out, lse

        return call

    def forward(self, case: GpuCase, tensors: Tensors) -> Call:
        """As in :class:`GpuImplementation`."""
        return self._forward(case, tensors)

    def backward(self, case: GpuCase, tensors: Tensors) -> Call:
        """As in :class:`GpuImplementation`."""
        q, k, v, dout = tensors
        out, lse = self._forward(case, tensors)()
        given = attention_delta(out, dout) if self.is_alone else None
        grads = [self._result(x) for x in (q, k, v)]
        if self.is_alone:
            for grad in grads:
                grad.zero_()

        def call() -> list[Tensor]:
            delta = attention_delta(out, dout) if given is None else given
            if self.blocks > 1:
                for grad in grads:
                    grad.zero_()
            dq, dk, dv = grads
            adds = self.blocks > 1 or self.is_alone
            for part, options in self._tiles(case):
                parts = (q, k[part], v[part], lse, delta, dq, dk[part], dv[part])
                self.kernel.backward(dout, *parts, accumulate=adds, **options)
            return grads if self.is_alone else [grad.to(q.dtype) for grad in grads]

        return call


class _Differentiable:
    """A function of q, k, v in torch's layout (B, H, S, D), differentiated with autograd."""

    def attend(self, case: GpuCase, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        raise NotImplementedError

    def inputs(self, case: GpuCase, tensors: Tensors) -> list[Tensor]:
        return [x.permute(1, 2, 0, 3).contiguous() for x in tensors]

    def forward(self, case: GpuCase, tensors: Tensors) -> Call:
        q, k, v, _ = self.inputs(case, tensors)
        attend = self.attend(case, q.device)

        def call() -> Tensor:
            with torch.no_grad():
                return attend(q, k, v)

        return call

    def backward(self, case: GpuCase, tensors: Tensors) -> Call:
        q, k, v, dout = self.inputs(case, tensors)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = self.attend(case, q.device)(*leaves)
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


@dataclass(frozen=True, slots=True)
class Sdpa(_Differentiable):
    """One backend of torch's scaled_dot_product_attention."""

    backend: str
    repeat: bool = False
    """Repeat key/value heads for backends without GQA; the copies are made outside the timed region."""

    @property
    def name(self) -> str:
        """As in :class:`GpuImplementation`."""
        return f"{self.backend}, K and V repeated" if self.repeat else self.backend

    def settings(self) -> AbstractContextManager[Any]:
        """Allows only this backend."""
        context: AbstractContextManager[Any] = sdpa_kernel(BACKENDS[self.backend])
        return context

    def inputs(self, case: GpuCase, tensors: Tensors) -> list[Tensor]:
        """Tensors in torch's layout, (B, H, S, D)."""
        q, k, v, dout = _Differentiable.inputs(self, case, tensors)
        if self.repeat:
            k, v = (x.repeat_interleave(case.kv_share, 1) for x in (k, v))
        return [q, k, v, dout]

    def attend(self, case: GpuCase, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The function of q, k and v."""
        grouped = case.kv_share > 1 and not self.repeat
        return lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=case.causal, enable_gqa=grouped
        )


@dataclass(frozen=True, slots=True)
class Flex(_Differentiable):
    """torch's flex_attention, compiled to the Triton kernel that is part of torch."""

    compiler: Callable[..., Any] = torch.compile

    @property
    def name(self) -> str:
        """As in :class:`GpuImplementation`."""
        return "flex (Triton)"

    def settings(self) -> AbstractContextManager[Any]:
        """Switches donated buffers off."""
        # With donated buffers, a compiled backward pass cannot run several times on one forward pass.
        context: AbstractContextManager[Any] = functorch.patch(donated_buffer=False)
        return context

    def attend(self, case: GpuCase, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The compiled function of q, k and v; raises UnsupportedError if it is not available for the case."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        reason = self._refusal(case, device)
        if reason is not None:
            raise UnsupportedError(
                explain(
                    got=f"flex_attention for {case.seq_length} tokens", rule=reason, remedy="Leave it out"
                )
            )
        torch.compiler.reset()  # cases have different shapes, and torch stops recompiling after a few
        mask = None
        if case.causal:
            length = case.seq_length
            mask = create_block_mask(
                lambda b, h, q, k: q >= k, None, None, length, length, device=str(device)
            )
        compiled = self.compiler(flex_attention)
        return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=case.kv_share > 1)

    def _refusal(self, case: GpuCase, device: torch.device) -> str | None:
        if device.type == "cuda" and importlib.util.find_spec("triton") is None:
            return "it needs Triton, which is not installed"
        if case.seq_length > FLEX_LONGEST:
            return (
                f"building its block mask needs S x S indices, so at most {FLEX_LONGEST} tokens are measured"
            )
        return None
