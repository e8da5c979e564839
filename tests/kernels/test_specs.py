"""Kernel specs: one owner for what a kernel supports, and the kernels agree with it."""

from __future__ import annotations

import importlib
import re

import pytest
import torch

from megatron_lightseq.attention import dist_attention
from megatron_lightseq.errors import UnsupportedError
from megatron_lightseq.kernels.registry import Kernel, refusal_of, resolve_kernel
from megatron_lightseq.kernels.specs import KERNELS, HeadDims, KernelSpec, kernel_names
from tests.packaging.fakes import ROOT

SPECS = pytest.mark.parametrize("spec", KERNELS.values(), ids=lambda spec: spec.name)
NOT_SUPPORTED = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.int8,
    torch.int64,
    torch.bool,
    torch.complex64,
)


@SPECS
def test_a_kernel_is_where_its_spec_says(spec: KernelSpec) -> None:
    module, _, attribute = spec.implementation.partition(":")
    made = getattr(importlib.import_module(module), attribute)()
    assert isinstance(made, Kernel)
    assert made.spec is spec
    assert made.name == spec.name == next(name for name, value in KERNELS.items() if value is spec)
    package = ROOT / "megatron_lightseq"
    assert all((ROOT / path).exists() or (package / path).exists() for path in spec.sources)
    assert (spec.package is None) == (spec.distribution is None)


@SPECS
def test_every_spec_describes_itself_in_one_line(spec: KernelSpec) -> None:
    assert "\n" not in spec.summary
    assert not spec.summary.endswith(".")
    for support in spec.devices:
        assert str(support.head_dims)
        assert all(hasattr(torch, dtype) for dtype in support.dtypes)


@SPECS
def test_a_kernel_takes_what_its_spec_says(spec: KernelSpec) -> None:
    """Checks every dtype on the CPU: ``unsupported`` refuses at least what the spec refuses."""
    module, _, attribute = spec.implementation.partition(":")
    kernel: Kernel = getattr(importlib.import_module(module), attribute)()
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, *NOT_SUPPORTED):
        q = torch.zeros(4, 1, 2, 64).to(dtype)
        assert kernel.unsupported(q, q, q) == refusal_of(spec, q, q, q)


def test_the_names_begin_with_auto_and_keep_its_order() -> None:
    assert kernel_names() == ("auto", *KERNELS)
    automatic = [spec.name for spec in KERNELS.values() if spec.in_auto]
    assert automatic == ["cuda", "cpu", "reference"]


@pytest.mark.parametrize("dtype", NOT_SUPPORTED, ids=str)
@pytest.mark.parametrize("kernel", ["auto", "reference", "cpu"])
def test_other_dtypes_are_refused_by_name(kernel: str, dtype: torch.dtype) -> None:
    q = torch.zeros(4, 1, 2, 16).to(dtype)
    name = str(dtype).removeprefix("torch.")
    message = rf"kernel '{kernel}' for {dtype} tensors on cpu: .*, not {name}.* Cast q, k and v to float32 or bfloat16"
    with pytest.raises(UnsupportedError, match=message):
        resolve_kernel(kernel, q, q, q)


def test_attention_refuses_float8() -> None:
    q = torch.zeros(4, 1, 2, 16).to(torch.float8_e4m3fn)
    with pytest.raises(UnsupportedError, match="not float8_e4m3fn"):
        dist_attention(q, q, q)


def test_mixed_dtypes_and_devices_are_refused() -> None:
    q = torch.zeros(4, 1, 2, 16)
    for k in (q.bfloat16(), q.to("meta")):
        with pytest.raises(UnsupportedError, match="it takes q, k and v of one dtype on one device"):
            resolve_kernel("reference", q, k, q)


@pytest.mark.parametrize(
    ("name", "facts", "reason"),
    [
        ("cpu", {"device_type": "cuda"}, "it takes tensors on the CPU only"),
        ("cuda", {"device_type": "cpu"}, "it takes tensors on a CUDA device only"),
        ("sdpa", {"device_type": "xpu"}, "it takes tensors on the CPU or a CUDA device only"),
        ("cuda", {"dtype": "float32"}, "it takes bfloat16 or float16, not float32"),
        (
            "sdpa",
            {"device_type": "cpu", "dtype": "float16"},
            "it takes float64, float32 or bfloat16, not float16",
        ),
        (
            "cuda",
            {"head_dim": 192},
            "it takes head dims 64, 80, 96, 128, 192:128, 256, not 192",
        ),
        ("cuda", {"head_dim": 128, "v_head_dim": 64}, "it takes head dims 64, .*, not 128:64"),
        (
            "flash_attn",
            {"head_dim": 100},
            "it takes head dims D = Dv, up to 256, multiples of 8, not 100",
        ),
        ("sdpa", {"has_window": True}, "it does not support sliding windows"),
        (
            "flash_attn",
            {"has_window": True, "cp_size": 4},
            "it supports sliding windows on one context-parallel rank only, not on 4",
        ),
        ("flash_attn", {"has_documents": True}, "it does not support packed documents"),
        (
            "sdpa",
            {"layout": "striped", "cp_size": 2},
            "it does not support causal tiles without their diagonal, which striped layouts have",
        ),
    ],
)
def test_refusals(name: str, facts: dict[str, object], reason: str) -> None:
    got = KERNELS[name].refusal(**facts)  # type: ignore[arg-type]
    assert got is not None
    assert re.fullmatch(reason, got), got


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("reference", {"device_type": "xpu", "dtype": "float64", "head_dim": 3, "v_head_dim": 5}),
        ("cpu", {"dtype": "bfloat16", "head_dim": 7, "has_window": True, "has_documents": True}),
        ("cuda", {"device_type": "cuda", "dtype": "float16", "head_dim": 192, "v_head_dim": 128}),
        ("flash_attn", {"has_window": True, "cp_size": 1, "head_dim": 256}),
        ("sdpa", {"layout": "striped", "cp_size": 1}),
        ("sdpa", {"dtype": "float16"}),  # on CUDA
        ("sdpa", {"device_type": "cpu", "head_dim": 100}),
    ],
)
def test_what_is_supported_is_not_refused(name: str, facts: dict[str, object]) -> None:
    assert KERNELS[name].refusal(**facts) is None  # type: ignore[arg-type]


def test_head_dims_in_words() -> None:
    assert str(HeadDims()) == "any"
    assert str(HeadDims(pairs=((64, 64), (192, 128)))) == "64, 192:128"
    assert str(KERNELS["flash_attn"].masks) == "full, causal, windows (one rank only); no striped layouts"
    assert str(KERNELS["cpu"].masks) == "any"
