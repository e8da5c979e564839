"""How a kernel of linear attention is chosen."""

from __future__ import annotations

from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.kernels.choose import choose_kernel
from megatron_lightseq.kernels.linear.contract import LinearKernel, Part
from megatron_lightseq.kernels.linear.specs import LINEAR_KERNELS, Decay, LinearKernelSpec
from megatron_lightseq.kernels.registry import dtype_name


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
    choice = choose_kernel(
        kernel,
        LINEAR_KERNELS,
        what="linear attention kernel",
        reason=lambda spec, found: refusal_of(spec, like) or found.unsupported(like),
        refused=lambda reason: _refused(kernel, reason, like),
    )
    chosen: LinearKernel = choice.kernel
    return chosen


def _refused(kernel: str, reason: str, like: Part) -> UnsupportedError:
    return UnsupportedError(
        explain(
            got=f"linear attention kernel {kernel!r} for {like.v.dtype} tensors on {like.v.device}",
            rule=reason,
            remedy="Choose kernel='torch', which takes any floating-point dtype on any device",
        )
    )
