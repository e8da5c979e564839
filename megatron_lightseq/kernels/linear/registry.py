"""How a kernel of linear attention is chosen."""

from __future__ import annotations

import difflib
import importlib
from typing import Protocol

from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.kernels.linear.contract import LinearKernel, Part
from megatron_lightseq.kernels.linear.specs import (
    LINEAR_KERNELS,
    Decay,
    LinearKernelSpec,
    linear_kernel_names,
)
from megatron_lightseq.kernels.registry import dtype_name
from megatron_lightseq.kernels.specs import AUTO


class _Shipped(LinearKernel, Protocol):
    """A kernel with a spec."""

    def unsupported(self, part: Part) -> str | None:
        """Why this machine cannot run it on such a part, or None."""


def refusal_of(spec: LinearKernelSpec, part: Part) -> str | None:
    """Why a spec excludes these inputs, as a clause about "it" (the kernel), or None."""
    decay = Decay.NONE
    if part.log_decay is not None:
        decay = Decay.HEAD if part.log_decay.dim() == 3 else Decay.CHANNEL
    return spec.refusal(
        device_type=part.v.device.type,
        dtype=dtype_name(part.v.dtype),
        head_dim=part.k.shape[-1],
        v_head_dim=part.v.shape[-1],
        decay=decay,
        has_beta=part.beta is not None,
    )


def resolve_linear_kernel(kernel: str | LinearKernel, like: Part) -> LinearKernel:
    """The kernel of that name, or with ``auto`` the first that takes such inputs; an object is returned as is.

    Raises:
        UnsupportedError: no kernel has that name, or the one named cannot take these inputs.
    """
    if not isinstance(kernel, str):
        return kernel
    if kernel == AUTO:
        return _first_supported(like)
    if kernel not in LINEAR_KERNELS:
        near = difflib.get_close_matches(kernel, linear_kernel_names(), n=1)
        raise UnsupportedError(
            explain(
                got=f"linear attention kernel {kernel!r}",
                rule=f"the kernels are {', '.join(linear_kernel_names())}",
                remedy=f"The nearest name is {near[0]!r}" if near else "Choose one of them",
            )
        )
    found, reason = _tried(LINEAR_KERNELS[kernel], like)
    if reason is not None:
        raise _refused(kernel, reason, like)
    return found


def _tried(spec: LinearKernelSpec, like: Part) -> tuple[_Shipped, str | None]:
    """The kernel of a spec, and why it cannot take such inputs."""
    module, _, attribute = spec.implementation.partition(":")
    kernel: _Shipped = getattr(importlib.import_module(module), attribute)()
    return kernel, refusal_of(spec, like) or kernel.unsupported(like)


def _first_supported(like: Part) -> LinearKernel:
    reasons = []
    for spec in LINEAR_KERNELS.values():
        if spec.in_auto:
            kernel, reason = _tried(spec, like)
            if reason is None:
                return kernel
            reasons.append(f"{spec.name}: {reason}")
    raise _refused(AUTO, "; ".join(reasons), like)


def _refused(kernel: str, reason: str, like: Part) -> UnsupportedError:
    return UnsupportedError(
        explain(
            got=f"linear attention kernel {kernel!r} for {like.v.dtype} tensors on {like.v.device}",
            rule=reason,
            remedy="Choose kernel='torch', which takes any floating-point dtype on any device",
        )
    )
