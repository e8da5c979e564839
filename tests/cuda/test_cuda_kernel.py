"""What kernels/cuda.py does around the compiled kernels: copying inputs, allocating results, warnings."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from megatron_lightseq.kernels import cuda
from megatron_lightseq.kernels.cuda import GradientTargets, _aligned, _suits_delta, delta_on_gpu, head_parts
from megatron_lightseq.kernels.delta import attention_delta

PACKED = torch.zeros(6, 2, 4, 3, 64, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("x", "is_copied"),
    [
        (PACKED[..., 0, :], False),
        (PACKED[..., 0, :][:1, :, :, :], False),
        (PACKED[:, :, :1, 0].expand(6, 2, 4, 64), True),  # one head for all: stride 0
        (PACKED[:, :, :1, 0].expand(6, 2, 1, 64), False),
        (PACKED[..., 0, :1].expand(6, 2, 4, 64), True),
        (
            torch.zeros(6 * 2 * 4 * 64 + 4, dtype=torch.bfloat16)[4:].view(6, 2, 4, 64),
            True,
        ),  # 8 bytes past an aligned address
        (torch.zeros(6, 2, 4, 68, dtype=torch.bfloat16)[..., :64], True),  # rows 136 bytes apart
    ],
)
def test_inputs_that_do_not_suit_the_kernels_are_copied(x: Tensor, is_copied: bool) -> None:
    got = _aligned(x)
    assert torch.equal(got, x)
    assert (got is not x) == is_copied
    assert all(stride % 8 == 0 for stride in got.stride()[:-1])
    assert all(stride > 0 for size, stride in zip(got.shape, got.stride(), strict=True) if size > 1)


class Reporting:
    """Stands in for the extension: returns the given reports, one per call."""

    def __init__(self, *reasons: str | None) -> None:
        self.reasons = list(reasons)

    def cuda_fallback(self) -> str | None:
        return self.reasons.pop(0)


def test_a_fallback_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    extension = Reporting("the driver refused a tensor map with CUresult 1", None)
    monkeypatch.setattr(cuda, "load_extension", lambda kernel: extension)
    with pytest.warns(RuntimeWarning, match="the driver refused a tensor map with CUresult 1"):
        cuda._warn_of_fallback()
    cuda._warn_of_fallback()
    assert extension.reasons == []


@pytest.mark.parametrize(
    ("num_keys", "batch", "num_kv_heads", "group", "parts"),
    [
        (8192, 1, 1, 8, 8),  # 64 blocks on 132 multiprocessors
        (8192, 1, 2, 4, 4),  # 128 blocks: two parts would be 256
        (8192, 1, 2, 6, 3),
        (8192, 4, 2, 4, 1),
        (16384, 1, 1, 7, 7),  # a prime number of heads has no other divisor
        (100, 1, 1, 1, 1),
    ],
)
def test_heads_are_shared_until_two_blocks_wait_for_each_multiprocessor(
    num_keys: int, batch: int, num_kv_heads: int, group: int, parts: int
) -> None:
    assert head_parts(num_keys, batch, num_kv_heads, group, 132) == parts


def gradients(dtype: torch.dtype, queries: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, full of NaN."""
    nan = float("nan")
    return tuple(torch.full((n, 1, 2, 8), nan, dtype=dtype) for n in (queries, 7, 7))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("options", "summed"),
    [
        ({"deterministic": False, "parts": 1}, (True, False, False)),
        ({"deterministic": False, "parts": 2}, (True, True, True)),
        ({"deterministic": True, "parts": 1}, (False, False, False)),
    ],
    ids=str,
)
def test_only_what_blocks_add_to_is_zeroed(
    dtype: torch.dtype, options: dict[str, int], summed: tuple[bool, ...]
) -> None:
    results = gradients(dtype)
    targets = GradientTargets.prepare(results, accumulate=False, is_one_launch=True, **options)  # type: ignore[arg-type]
    for result, written, is_summed in zip(results, targets.written, summed, strict=True):
        if is_summed:
            assert torch.equal(written, torch.zeros(result.shape))
        assert (written is result) == (dtype == torch.float32 or not is_summed)
        written.fill_(1.5)
    targets.finish()
    for result in results:
        assert torch.equal(result, torch.full_like(result, 1.5))


def test_several_launches_add_up_in_fp32() -> None:
    results = gradients(torch.float16)
    options = {"accumulate": False, "deterministic": True, "parts": 1}
    targets = GradientTargets.prepare(results, is_one_launch=False, **options)  # type: ignore[arg-type]
    assert targets.written[0] is results[0]
    assert [x.dtype for x in targets.written[1:]] == [torch.float32] * 2


def test_nothing_is_zeroed_where_the_call_adds() -> None:
    for deterministic, parts in itertools.product((False, True), (1, 2)):
        results = gradients(torch.float32)
        targets = GradientTargets.prepare(
            results, accumulate=True, deterministic=deterministic, parts=parts, is_one_launch=True
        )
        assert targets.written == results
        assert all(x.isnan().all() for x in results)


def test_a_call_that_launches_nothing_writes_zeros() -> None:
    results = gradients(torch.bfloat16, queries=0)
    targets = GradientTargets.prepare(
        results, accumulate=False, deterministic=True, parts=1, is_one_launch=True
    )
    targets.finish()
    assert all(torch.equal(x, torch.zeros_like(x)) for x in results)


ROWS = torch.randn(6, 2, 4, 64)


@pytest.mark.parametrize(
    ("out", "dout", "suits"),
    [
        (ROWS, ROWS.bfloat16(), True),
        (ROWS.half(), ROWS.half(), True),
        (ROWS.half(), ROWS.bfloat16(), False),
        (ROWS, ROWS, False),
        (ROWS[..., :60], ROWS[..., :60].half(), False),  # no multiple of 8
        (ROWS, torch.ones((), dtype=torch.float16).expand(ROWS.shape), False),  # the gradient of a sum
        (ROWS.expand(6, 2, 4, 64), ROWS.half(), True),
        (torch.zeros(1, 1, 1, 264), torch.zeros(1, 1, 1, 264).half(), False),
    ],
)
def test_the_kernel_for_delta_takes_what_it_can_read(out: Tensor, dout: Tensor, suits: bool) -> None:
    assert _suits_delta(out, dout) == suits


def test_delta_without_compiled_kernels_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "missing_cuda", lambda: "not built")
    assert delta_on_gpu(ROWS, ROWS.bfloat16()) is None
    got = attention_delta(ROWS, ROWS.half())
    torch.testing.assert_close(got, (ROWS * ROWS.half()).sum(-1).permute(1, 2, 0))
