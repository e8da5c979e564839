"""What each attention kernel supports, defined in one place.

Names, choices of ``--cp-kernel``, configuration rules, ``Kernel.unsupported`` and the documents' table are derived
from :data:`KERNELS`. A spec states what a kernel supports on every machine; ``Kernel.unsupported`` adds what depends on
this machine, such as whether the extension is built and which GPU is present.

Standard library only, so that configurations load without torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from megatron_lightseq.layout import LAYOUTS

AUTO = "auto"
"""Not a kernel: stands for the first kernel with ``in_auto`` that supports the inputs."""

ANY_DEVICE = "any"

_DEVICE_NAMES = {"cpu": "the CPU", "cuda": "a CUDA device"}


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadDims:
    """Which pairs of head dims (D of queries and keys, Dv of values) a kernel supports; default: all."""

    pairs: tuple[tuple[int, int], ...] | None = None
    """The only pairs (D, Dv) supported; None: no such list."""
    equal: bool = False
    """Whether D and Dv must be equal."""
    largest: int | None = None
    multiple_of: int = 1

    def __str__(self) -> str:
        if self.pairs is not None:
            return ", ".join(str(d) if d == dv else f"{d}:{dv}" for d, dv in self.pairs)
        parts = ["D = Dv"] if self.equal else []
        if self.largest is not None:
            parts.append(f"up to {self.largest}")
        if self.multiple_of > 1:
            parts.append(f"multiples of {self.multiple_of}")
        return ", ".join(parts) or "any"

    def supports(self, head_dim: int, v_head_dim: int) -> bool:
        """Whether queries and keys may have ``head_dim`` and values ``v_head_dim`` elements per head."""
        if self.pairs is not None:
            return (head_dim, v_head_dim) in self.pairs
        if self.equal and head_dim != v_head_dim:
            return False
        return all(
            dim <= (self.largest or dim) and dim % self.multiple_of == 0 for dim in (head_dim, v_head_dim)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceSupport:
    """What a kernel supports on one type of device."""

    device_type: str
    """``cpu``, ``cuda`` (as in ``torch.device.type``) or :data:`ANY_DEVICE`."""
    dtypes: tuple[str, ...]
    """Names of torch dtypes, without the prefix."""
    head_dims: HeadDims = HeadDims()

    def refusal(self, dtype: str | None, head_dim: int | None, v_head_dim: int | None) -> str | None:
        """Why the kernel does not support these inputs on this device, or None. Arguments that are None are ignored."""
        if dtype is not None and dtype not in self.dtypes:
            return f"it takes {_either(self.dtypes)}, not {dtype}"
        if head_dim is None or self.head_dims.supports(head_dim, v_head_dim or head_dim):
            return None
        return f"it takes head dims {self.head_dims}, not {_dims_text(head_dim, v_head_dim or head_dim)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskSupport:
    """Which masks a kernel supports; full and causal masks on contiguous and zigzag layouts always are."""

    windows: Literal["any", "one rank", "none"] = "any"
    """Where sliding windows are supported: anywhere, with one context-parallel rank only, or nowhere."""
    documents: bool = True
    """Whether packed documents are supported."""
    striped: bool = True
    """Whether striped layouts are: some of their causal tiles exclude the diagonal."""

    def __str__(self) -> str:
        if self == MaskSupport():
            return "any"
        windows = {"any": ["windows"], "one rank": ["windows (one rank only)"], "none": []}[self.windows]
        kinds = ["full", "causal", *windows, *(["documents"] if self.documents else [])]
        return ", ".join(kinds) + ("" if self.striped else "; no striped layouts")

    def refusal(
        self, *, has_window: bool, has_documents: bool, layout: str | None, cp_size: int
    ) -> str | None:
        """Why the kernel does not support this mask, or None."""
        if has_window and self.windows == "none":
            return "it does not support sliding windows"
        if has_window and self.windows == "one rank" and cp_size > 1:
            return f"it supports sliding windows on one context-parallel rank only, not on {cp_size}"
        if has_documents and not self.documents:
            return "it does not support packed documents"
        if layout is not None and LAYOUTS[layout].interleaved and cp_size > 1 and not self.striped:
            return f"it does not support causal tiles without their diagonal, which {layout} layouts have"
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelSpec:
    """One attention kernel: its name, where it is, and what it supports."""

    name: str
    """The word for ``kernel=`` and ``--cp-kernel``."""
    summary: str
    """One line for help texts and documents, without a full stop."""
    implementation: str
    """``module:Class``; importing it may need torch."""
    sources: tuple[str, ...]
    """Files and folders that hold it, relative to the repository."""
    devices: tuple[DeviceSupport, ...]
    masks: MaskSupport = MaskSupport()
    softcap: bool = False
    """Whether scores may be bounded by a softcap."""
    in_auto: bool = True
    """Whether ``auto`` may choose it; the others run only when asked for by name."""
    package: str | None = None
    """The module that must be importable besides torch; None for none."""
    distribution: str | None = None
    """What to ``pip install`` for :attr:`package`."""

    @property
    def device_types(self) -> tuple[str, ...]:
        """The types of device that it runs on; :data:`ANY_DEVICE` stands for all."""
        return tuple(support.device_type for support in self.devices)

    def runs_on(self, device_type: str) -> bool:
        """Whether it runs on devices of this type (``torch.device.type``)."""
        return not {device_type, ANY_DEVICE}.isdisjoint(self.device_types)

    def refusal(
        self,
        *,
        device_type: str | None = None,
        dtype: str | None = None,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        has_window: bool = False,
        has_documents: bool = False,
        has_softcap: bool = False,
        layout: str | None = None,
        cp_size: int = 1,
    ) -> str | None:
        """Why the kernel does not support something, as a clause about "it"; None if it does.

        Args:
            device_type: ``cpu`` or ``cuda``; None: not known, some device that the kernel runs on must do.
            dtype: name of the dtype of q, k and v, such as ``bfloat16``; None: not known.
            head_dim: elements of a query or key per head; None: not known.
            v_head_dim: elements of a value per head; None: as ``head_dim``.
            has_window: whether the mask has a sliding window.
            has_documents: whether the mask has packed documents.
            has_softcap: whether scores are bounded by a softcap.
            layout: name of the layout; None: not known.
            cp_size: number of context-parallel ranks.
        """
        fitting = [
            s for s in self.devices if device_type in (None, s.device_type) or s.device_type == ANY_DEVICE
        ]
        if not fitting:
            return f"it takes tensors on {_either(_DEVICE_NAMES[name] for name in self.device_types)} only"
        reasons = [support.refusal(dtype, head_dim, v_head_dim) for support in fitting]
        if all(reasons):
            return reasons[0]
        if has_softcap and not self.softcap:
            return "it does not bound scores by a softcap"
        return self.masks.refusal(
            has_window=has_window, has_documents=has_documents, layout=layout, cp_size=cp_size
        )


CUDA_HEAD_DIMS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256))
"""(D, Dv) of the compiled CUDA kernels."""

_FLASH_HEAD_DIMS = HeadDims(equal=True, largest=256, multiple_of=8)

_SPECS = (
    KernelSpec(
        name="cuda",
        summary="fused CUDA kernels for compute capability 8.0 and later, with kernels specific to Hopper",
        implementation="megatron_lightseq.kernels.cuda:CudaKernel",
        sources=("csrc/cuda", "kernels/cuda.py"),
        devices=(
            DeviceSupport(
                device_type="cuda",
                dtypes=("bfloat16", "float16"),
                head_dims=HeadDims(pairs=CUDA_HEAD_DIMS),
            ),
        ),
        softcap=True,
    ),
    KernelSpec(
        name="cpu",
        summary="fused C++ kernel for CPUs, with variants by instruction set chosen at run time",
        implementation="megatron_lightseq.kernels.cpu:CpuKernel",
        sources=("csrc/cpu", "kernels/cpu.py"),
        devices=(DeviceSupport(device_type="cpu", dtypes=("float32", "bfloat16")),),
        softcap=True,
    ),
    KernelSpec(
        name="reference",
        summary="unfused attention in plain torch, on any device; holds whole score matrices",
        implementation="megatron_lightseq.kernels.reference:ReferenceKernel",
        sources=("kernels/reference.py",),
        devices=(
            DeviceSupport(device_type=ANY_DEVICE, dtypes=("float64", "float32", "bfloat16", "float16")),
        ),
        softcap=True,
    ),
    KernelSpec(
        name="flash_attn",
        summary="adapter to the flash-attn package (FlashAttention-2)",
        implementation="megatron_lightseq.kernels.flash_attn:FlashAttnKernel",
        sources=("kernels/flash_attn.py",),
        devices=(
            DeviceSupport(device_type="cuda", dtypes=("bfloat16", "float16"), head_dims=_FLASH_HEAD_DIMS),
        ),
        masks=MaskSupport(windows="one rank", documents=False, striped=False),
        in_auto=False,
        package="flash_attn",
        distribution="flash-attn",
    ),
    KernelSpec(
        name="sdpa",
        summary="adapter to the flash backend of torch's scaled_dot_product_attention",
        implementation="megatron_lightseq.kernels.sdpa:SdpaKernel",
        sources=("kernels/sdpa.py",),
        devices=(
            DeviceSupport(
                device_type="cpu", dtypes=("float64", "float32", "bfloat16"), head_dims=HeadDims(equal=True)
            ),
            DeviceSupport(device_type="cuda", dtypes=("bfloat16", "float16"), head_dims=_FLASH_HEAD_DIMS),
        ),
        masks=MaskSupport(windows="none", documents=False, striped=False),
        in_auto=False,
    ),
)

KERNELS: dict[str, KernelSpec] = {spec.name: spec for spec in _SPECS}
"""Every kernel by name, in the order in which ``auto`` tries them."""


REPEATING_KERNELS = ("cpu", "reference")
"""Kernels whose result for a tile depends on nothing but the tile, bit for bit."""


def kernel_names() -> tuple[str, ...]:
    """Every name that ``kernel=`` and ``--cp-kernel`` accept: ``auto`` and those of :data:`KERNELS`."""
    return (AUTO, *KERNELS)


def _either(names: Iterable[str]) -> str:
    """``a``, ``a or b``, ``a, b or c``."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def _dims_text(head_dim: int, v_head_dim: int) -> str:
    return str(head_dim) if head_dim == v_head_dim else f"{head_dim}:{v_head_dim}"
