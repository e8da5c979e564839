"""The C++ kernel of linear attention: every kind of it against the recurrence, bits, strides, refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lightseq.kernels.extension import load_extension
from megatron_lightseq.kernels.linear.contract import Documents, Part
from megatron_lightseq.kernels.linear.cpu import CpuLinearKernel
from megatron_lightseq.kernels.linear.registry import resolve_linear_kernel
from megatron_lightseq.mask import Mask
from tests.linear.cases import FAMILIES, Inputs, attended, error, expected, inputs

MASKS = {
    "causal": [Mask.causal()],
    "documents": [Mask.documents([0, 1, 100, 101, 200, 420])],
    "padded": [Mask.padded([0, 130, 420], [77, 200])],
    "rows": [Mask.documents([0, 140, 150, 420]), Mask.causal()],
}
FP32_ERROR = 2e-6
KERNEL = CpuLinearKernel()


def in_fp32(tensors: Inputs) -> Inputs:
    return [None if x is None else x.float() for x in tensors]


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_recurrence(family: str) -> None:
    for kv_heads in (1, 2):
        tensors, dout = inputs(family, 420, kv_heads=kv_heads)
        for name, masks in MASKS.items():
            want = expected(tensors, dout, masks)
            mask = masks if len(masks) > 1 else masks[0]
            got = attended(2, in_fp32(tensors), dout.float(), mask, "cpu")
            assert error([x.double() for x in got], want) <= FP32_ERROR, (name, kv_heads)


@pytest.mark.parametrize("family", ["scalar", "gdn", "kda"])
@pytest.mark.parametrize("dims", [(1, 1, 1), (3, 70, 33), (6, 16, 64), (64, 130, 20), (97, 20, 130)], ids=str)
def test_any_length_and_head_dims(family: str, dims: tuple[int, int, int]) -> None:
    tokens, key_dim, value_dim = dims
    tensors, dout = _inputs(family, tokens, key_dim, value_dim)
    want = attended(1, tensors, dout, kernel="torch")
    got = attended(1, in_fp32(tensors), dout.float(), kernel="cpu")
    assert error([x.double() for x in got], want) <= FP32_ERROR


def _inputs(family: str, tokens: int, key_dim: int, value_dim: int) -> tuple[Inputs, Tensor]:
    """As of :func:`inputs`, with other head dims; keys of unit length."""
    source = torch.Generator().manual_seed(tokens)

    def random(*shape: int) -> Tensor:
        return torch.randn(tokens, 2, 2, *shape, generator=source, dtype=torch.float64)

    q, k = (torch.nn.functional.normalize(random(key_dim), dim=-1) for _ in range(2))
    decay = -random(*([key_dim] if family == "kda" else [])).abs()
    beta = None if family == "scalar" else random().sigmoid()
    return [q, k, random(value_dim), decay, beta], random(value_dim)


@pytest.mark.parametrize("family", FAMILIES)
def test_bits_depend_on_neither_ranks_nor_scans_nor_threads(family: str) -> None:
    tokens = 1920
    tensors, dout = inputs(family, tokens, dtype=torch.float32)
    mask = Mask.documents([0, 7, 700, 1300, tokens])
    one = attended(1, tensors, dout, mask, "cpu")
    threads = torch.get_num_threads()
    for size, scan in ((1, "ring"), (2, "ring"), (3, "doubling"), (4, "all_gather"), (8, "ring")):
        torch.set_num_threads(2 if size == 1 else 1)
        got = attended(size, tensors, dout, mask, "cpu", scan=scan)
        torch.set_num_threads(threads)
        assert all(map(torch.equal, one, got)), (size, scan)


@pytest.mark.parametrize("family", ["scalar", "gdn", "vector", "kda"])
@pytest.mark.parametrize("mean", [-1.0, -15.0])
def test_gradients_of_strong_gates(family: str, mean: float) -> None:
    tensors, dout = inputs(family, 256)
    assert tensors[3] is not None
    source = torch.Generator().manual_seed(1)
    spread = torch.rand(tensors[3].shape, generator=source, dtype=torch.float64)
    tensors[3] = mean * (0.8 + 0.4 * spread)  # strong ones alone: weak ones would hide their errors
    exact = attended(1, tensors, dout, kernel="torch")
    for want, got in zip(exact, attended(2, in_fp32(tensors), dout.float(), kernel="cpu"), strict=True):
        assert (got.double() - want).norm() <= 2e-5 * want.norm()


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_bf16_inputs_are_computed_in_fp32(kv_heads: int) -> None:
    tensors, dout = inputs("gdn", 512, kv_heads=kv_heads)
    low = [None if x is None else x.bfloat16() if i < 4 else x.float() for i, x in enumerate(tensors)]
    got = attended(2, low, dout.bfloat16(), kernel="cpu")
    want = attended(1, [None if x is None else x.double() for x in low], dout.bfloat16().double())
    assert [x.dtype for x in got] == [torch.bfloat16] * 5 + [torch.float32]
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).abs().max() <= 2**-8 * b.abs().max()


def test_any_strides() -> None:
    tensors, dout = inputs("kda", 96, dtype=torch.float32)
    want = attended(1, tensors, dout, kernel="cpu")
    turned = [None if x is None else x.mT.contiguous().mT for x in tensors]
    assert turned[0] is not None
    assert turned[0].stride(-1) != 1
    assert all(map(torch.equal, want, attended(1, turned, dout.mT.contiguous().mT, kernel="cpu")))


def test_auto_takes_it_on_cpus() -> None:
    assert resolve_linear_kernel("auto", _part()).name == "cpu"
    in_fp64 = _part().with_tensors([None if x is None else x.double() for x in _part().tensors])
    assert resolve_linear_kernel("auto", in_fp64).name == "torch"


def _part(**changes: Any) -> Part:
    tensors, _ = inputs("gdn", 96, dtype=torch.float32)
    given = {"piece": 48, "scale": 0.5, "documents": None, "heads": 2} | changes
    return Part.of(tensors, **given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"piece": 50}, "piece is 50 and S is 96: pieces must be whole"),
        ({"heads": 3}, "q has 2 heads: they must divide the 3 heads of the output"),
        ({"scale": float("nan")}, "scale is nan: it must be finite and above 0"),
        (
            {
                "documents": Documents(
                    torch.zeros(3, 96, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
                )
            },
            "documents has shape (3, 96): it must have one row",
        ),
        (
            {"documents": Documents(torch.zeros(1, 96), torch.zeros(1, dtype=torch.int64))},
            "documents is float32: it must be int64",
        ),
    ],
)
def test_arguments_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError) as raised:
        KERNEL.summarise(_part(**changes))
    assert message in str(raised.value)


def test_results_are_checked() -> None:
    part = _part()
    states = torch.zeros(2, 2, 2, 5, 4)
    with pytest.raises(RuntimeError, match="states has shape"):
        KERNEL.outer(part, None, states[:1], torch.empty(96, 2, 2, 4))
    with pytest.raises(RuntimeError, match="out has shape"):
        KERNEL.outer(part, None, states, torch.empty(96, 2, 2, 5))
    with pytest.raises(RuntimeError, match="dtype of q, or float32"):
        KERNEL.outer(part, None, states, torch.empty(96, 2, 2, 4, dtype=torch.bfloat16))


EVERY_FAMILY = """
import torch
from megatron_lightseq.mask import Mask
from tests.linear.cases import FAMILIES, attended, error, expected, inputs

for family in FAMILIES:
    tensors, dout = inputs(family, 210, kv_heads=1)
    mask = Mask.documents([0, 1, 90, 210])
    want = expected(tensors, dout, [mask])
    got = attended(1, [None if x is None else x.float() for x in tensors], dout.float(), mask, "cpu")
    assert error([x.double() for x in got], want) <= 2e-6, family
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_variant(isa: str) -> None:
    env = os.environ | {"MLS_CPU_ISA": isa, "PYTHONPATH": ":".join(sys.path)}
    ask = [sys.executable, "-c", "import torch, megatron_lightseq._C as c; print(c.cpu_isa)"]
    if subprocess.run(ask, env=env, capture_output=True, check=False).returncode:
        pytest.skip(f"this machine or build has no {isa}")
    subprocess.run([sys.executable, "-c", EVERY_FAMILY], env=env, check=True, timeout=120)


def test_operators_trace() -> None:
    load_extension()
    q = torch.ones(4, 1, 1, 2)
    write, transition = torch.empty(1, 1, 1, 2, 2), torch.empty(1, 1, 1, 1, 1)
    arguments = (q, q, q, None, None, None, None, 4, 1, 1.0, transition, write)
    torch.library.opcheck(torch.ops.mls.linear_summarise.default, arguments)
