"""What each kernel of linear attention supports, defined in one place; the counterpart of :mod:`kernels.specs`.

Standard library only, so that configurations load without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from megatron_lightseq.kernels.specs import ANY_DEVICE, DeviceSupport, HeadDims


class Decay(StrEnum):
    """What ``log_decay`` is for."""

    NONE = "no decay"
    HEAD = "a decay of each head"
    CHANNEL = "a decay of each channel"


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearKernelSpec:
    """One kernel of linear attention: its name, where it is, and what it supports."""

    name: str
    """The word for ``kernel=``."""
    summary: str
    """One line for help texts and documents, without a full stop."""
    implementation: str
    """``module:Class``; importing it may need torch."""
    sources: tuple[str, ...]
    """Files and folders that hold it, relative to the repository."""
    devices: tuple[DeviceSupport, ...]
    decays: tuple[Decay, ...] = tuple(Decay)
    delta_rule: bool = True
    """Whether it takes ``beta``."""
    in_auto: bool = True
    """Whether ``auto`` may choose it; the others run only when asked for by name."""
    package: str | None = None
    """The module that must be importable besides torch; None for none."""
    distribution: str | None = None
    """What to ``pip install`` for :attr:`package`."""

    def refusal(
        self,
        *,
        device_type: str,
        dtype: str,
        head_dim: int,
        v_head_dim: int,
        decay: Decay,
        has_beta: bool,
    ) -> str | None:
        """Why the kernel does not support these inputs, as a clause about "it", or None."""
        device = next((d for d in self.devices if d.device_type in (device_type, ANY_DEVICE)), None)
        if device is None:
            return f"it runs on {' or '.join(d.device_type for d in self.devices)}, not on {device_type}"
        if decay not in self.decays:
            return f"it takes {' or '.join(self.decays)}, not {decay}"
        if has_beta and not self.delta_rule:
            return "it does not take beta, the delta rule"
        return device.refusal(dtype, head_dim, v_head_dim)


_FLOATS = ("float64", "float32", "bfloat16", "float16")

LINEAR_KERNELS = {
    spec.name: spec
    for spec in (
        LinearKernelSpec(
            name="cpu",
            summary="fused C++ kernel for CPUs, with variants by instruction set chosen at run time",
            implementation="megatron_lightseq.kernels.linear.cpu:CpuLinearKernel",
            sources=("csrc/cpu/linear", "megatron_lightseq/kernels/linear/cpu.py"),
            devices=(DeviceSupport(device_type="cpu", dtypes=("float32", "bfloat16")),),
        ),
        LinearKernelSpec(
            name="torch",
            summary="matrix products over blocks of 64 tokens in plain torch, on any device",
            implementation="megatron_lightseq.kernels.linear.chunked:TorchLinearKernel",
            sources=(
                "megatron_lightseq/kernels/linear/chunked.py",
                "megatron_lightseq/kernels/linear/blocks.py",
            ),
            devices=(DeviceSupport(device_type=ANY_DEVICE, dtypes=_FLOATS, head_dims=HeadDims()),),
        ),
        LinearKernelSpec(
            name="reference",
            summary="the recurrence, one token after another, in plain torch",
            implementation="megatron_lightseq.kernels.linear.reference:ReferenceLinearKernel",
            sources=("megatron_lightseq/kernels/linear/reference.py",),
            devices=(DeviceSupport(device_type=ANY_DEVICE, dtypes=_FLOATS, head_dims=HeadDims()),),
            in_auto=False,
        ),
    )
}
"""Every kernel of linear attention by name, in the order in which ``auto`` looks at them."""


def linear_kernel_names() -> tuple[str, ...]:
    """The words for ``kernel=``."""
    return ("auto", *LINEAR_KERNELS)
