"""The fused C++ kernel of linear attention for CPUs (csrc/cpu/linear): blocks of 64 tokens in scratch memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_lightseq.kernels.extension import load_extension, missing_extension
from megatron_lightseq.kernels.linear.contract import Gradients, Part, StateMap
from megatron_lightseq.kernels.linear.specs import LINEAR_KERNELS


class CpuLinearKernel:
    """float32 and bfloat16, states and gates in fp32; any head dims, lengths and sharing of heads.

    Results are bitwise reproducible on any number of threads (``torch.set_num_threads``).
    """

    spec = LINEAR_KERNELS["cpu"]
    name = spec.name
    longest_part = 8192

    def unsupported(self, part: Part) -> str | None:
        """Why this machine cannot run the kernel, or None."""
        return missing_extension()

    def summarise(self, part: Part) -> tuple[StateMap, None]:
        """As in :class:`~.contract.LinearKernel`."""
        maps = StateMap(_states(part, *_transition_shape(part)), _states(part))
        _run("summarise", part, *maps)
        return maps, None

    def inner(self, part: Part, kept: None) -> None:
        """As in :class:`~.contract.LinearKernel`: nothing."""

    def outer(self, part: Part, inner: None, states: Tensor, out: Tensor) -> None:
        """As in :class:`~.contract.LinearKernel`."""
        _run("forward", part, states.contiguous(), out)

    def summarise_backward(self, part: Part, dout: Tensor) -> tuple[Tensor, None]:
        """As in :class:`~.contract.LinearKernel`."""
        gives = _states(part)
        _run("summarise_backward", part, _dense(dout), gives)
        return gives, None

    def backward(
        self, part: Part, dout: Tensor, states: Tensor, behind: Tensor, kept: None, gradients: Gradients
    ) -> None:
        """As in :class:`~.contract.LinearKernel`."""
        shared = [x is not None and i < 3 and x.shape[2] < part.heads for i, x in enumerate(gradients)]
        written = [
            x if x is None or x.dtype == (torch.float32 if exact or i > 2 else part.v.dtype) else x.float()
            for i, (x, exact) in enumerate(zip(gradients, shared, strict=True))
        ]
        _run("backward", part, _dense(dout), states.contiguous(), behind.contiguous(), *written)
        for to, x in zip(gradients, written, strict=True):
            if to is not None and x is not None and x is not to:
                to.copy_(x)


def _run(operation: str, part: Part, *results: Any) -> None:
    load_extension()
    documents = (None, None) if part.documents is None else (part.documents.of_token, part.documents.before)
    gates = [None if x is None else x.float() for x in (part.log_decay, part.beta)]
    inputs = [_dense(x) for x in (part.q, part.k, part.v)]
    op = getattr(torch.ops.mls, f"linear_{operation}")
    channels = gates[0] is not None and gates[0].dim() == 4
    op(
        *inputs,
        _dense(gates[0]) if channels and gates[0] is not None else gates[0],
        gates[1],
        *documents,
        part.piece,
        part.heads,
        part.scale,
        *results,
    )


def _dense(x: Tensor) -> Tensor:
    """With a contiguous last dimension."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _transition_shape(part: Part) -> tuple[int, int]:
    key_dim = part.k.shape[3]
    if part.beta is not None:
        return key_dim, key_dim
    return (key_dim if part.log_decay is not None and part.log_decay.dim() == 4 else 1), 1


def _states(part: Part, rows: int | None = None, columns: int | None = None) -> Tensor:
    """Memory for matrices of the pieces, (n, B, H, rows, columns)."""
    shape = (part.k.shape[3] if rows is None else rows), (part.v.shape[3] if columns is None else columns)
    return torch.empty(part.pieces, part.v.shape[1], part.heads, *shape)
