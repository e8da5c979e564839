"""The source of the CUDA kernels, run on the emulated GPU, against fp64."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_lightseq.kernels.cuda import HEAD_DIMS
from tests.cuda.emulator import BackwardOptions, EmulationError, Emulator
from tests.cuda.judge import expect_gradients, expect_output, run_forward
from tests.kernels.oracle import Case, Results, delta, expect_within_budget, inputs, run_kernel, with_keys

CAUSAL = Case(queries=150, keys=200, heads=4, groups=2, head_dim=64, value_dim=64, band_hi=50)
TILES = (
    Case(queries=100, keys=77),
    Case(queries=1, keys=1),
    Case(queries=70, keys=130, heads=3, groups=1, band_hi=60),
    Case(queries=130, keys=130, band_lo=-30, band_hi=5, batch=2),
    Case(queries=140, keys=150, ranges="documents", band_hi=0),
    Case(queries=90, keys=100, ranges="random"),
    Case(queries=100, keys=40, band_hi=-50),
    Case(queries=70, keys=70, ranges="empty"),
    Case(queries=65, keys=129, amplitude=8.0),
)
HOPPER_TILES = (
    (Case(queries=100, keys=77), 1),
    (Case(queries=150, keys=300, heads=4, groups=2, band_hi=150), 2),
    (Case(queries=130, keys=300, batch=2, heads=1, band_lo=-30, band_hi=200), 3),
    (Case(queries=200, keys=290, heads=1, ranges="documents", band_hi=0), 4),
    (Case(queries=90, keys=100, ranges="random"), 5),
    (Case(queries=5, keys=700, heads=1, amplitude=4.0), 6),
)
ONE_KEY_HEAD = (Case(queries=100, keys=150, heads=6, groups=1), 7)
"""Two blocks of keys do not fill the multiprocessors, so the query heads of the group are split among four blocks."""


def run_with_gradients(case: Case, dtype: torch.dtype, kernel: Emulator) -> Results:
    tensors = inputs(case, dtype)
    results = run_kernel(case, tensors, kernel)
    expect_within_budget(case, dtype, tensors, results)
    return results


@pytest.mark.parametrize("case", TILES, ids=lambda case: f"{case.queries}x{case.keys}-{case.ranges}")
@pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "deterministic"])
def test_matches_fp64_on_awkward_tiles(library: Path, case: Case, deterministic: bool) -> None:
    kernel = Emulator(library, deterministic=deterministic)
    run_with_gradients(replace(case, head_dim=64, value_dim=64), torch.bfloat16, kernel)
    assert kernel.statistics().bank_conflicts == 0


@pytest.mark.parametrize("dims", HEAD_DIMS, ids=str)
@pytest.mark.parametrize(("case", "seed"), HOPPER_TILES, ids=str)
def test_hopper_matches_fp64(library: Path, case: Case, seed: int, dims: tuple[int, int]) -> None:
    case = replace(case, head_dim=dims[0], value_dim=dims[1])
    dtype = torch.float16 if seed % 2 else torch.bfloat16
    kernel = Emulator(library, "sm90", seed=seed)
    kernel.statistics()
    tensors = inputs(case, dtype)
    out, lse = run_forward(case, tensors, kernel)
    expect_output(case, dtype, tensors, out, lse)
    counts = kernel.statistics()
    assert counts.wgmma > 0
    assert counts.bank_conflicts == 0


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize(("case", "seed"), [*HOPPER_TILES, ONE_KEY_HEAD], ids=str)
def test_hopper_gradients_match_fp64(library: Path, case: Case, seed: int, head_dim: int) -> None:
    case = replace(case, head_dim=head_dim, value_dim=head_dim)
    dtype = torch.float16 if seed % 2 else torch.bfloat16
    kernel = Emulator(library, "sm90", seed=seed)
    kernel.statistics()
    expect_gradients(case, dtype, inputs(case, dtype), kernel)
    expect_gradients(case, dtype, inputs(case, dtype), replace(kernel, deterministic=True))
    counts = kernel.statistics()
    assert counts.wgmma > 0
    assert counts.mma == 0
    assert counts.bank_conflicts == 0


CAPPED = (
    (Case(queries=70, keys=150, heads=2, groups=1, band_hi=90, amplitude=8.0, softcap=3.0), 1),
    (Case(queries=90, keys=100, ranges="random", amplitude=20.0, softcap=50.0), 2),
)
"""Scores far beyond the softcap, where slopes vanish, and scores in the linear part."""


@pytest.mark.parametrize("architecture", ["sm80", "sm90"])
@pytest.mark.parametrize("dims", HEAD_DIMS, ids=str)
@pytest.mark.parametrize(("case", "seed"), CAPPED, ids=str)
def test_softcap_matches_fp64(
    library: Path, case: Case, seed: int, dims: tuple[int, int], architecture: str
) -> None:
    case = replace(case, head_dim=dims[0], value_dim=dims[1])
    dtype = torch.float16 if seed % 2 else torch.bfloat16
    kernel = Emulator(library, architecture, seed=seed)
    run_with_gradients(case, dtype, kernel)
    expect_gradients(case, dtype, inputs(case, dtype), replace(kernel, deterministic=True))


@pytest.mark.parametrize("architecture", ["sm80", "sm90"])
@pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "deterministic"])
def test_a_softcap_far_above_the_scores_changes_nothing(
    library: Path, architecture: str, deterministic: bool
) -> None:
    kernel = Emulator(library, architecture, deterministic=deterministic)
    tensors = inputs(CAUSAL, torch.bfloat16)
    want = run_kernel(CAUSAL, tensors, kernel)
    got = run_kernel(replace(CAUSAL, softcap=1e6), tensors, kernel)
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)
    assert not torch.equal(run_kernel(replace(CAUSAL, softcap=1.0), tensors, kernel)[0], want[0])


@pytest.mark.parametrize("architecture", ["sm80", "sm90"])
def test_keys_beyond_the_tensor_count_nothing_whatever_the_scores(library: Path, architecture: str) -> None:
    """All scores are near -160, so exp(0 - lse) of the zeros that pad a tile is infinite."""
    case = Case(queries=70, keys=100, head_dim=64, value_dim=64)
    _, k, v, dout = inputs(case, torch.bfloat16)
    q = torch.full((70, 1, 2, 64), -20.0).bfloat16()
    k = (1.0 + 0.02 * k.float()).bfloat16()
    expect_gradients(case, torch.bfloat16, (q, k, v, dout), Emulator(library, architecture))


@pytest.mark.parametrize("dims", HEAD_DIMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_matches_fp64_for_every_head_dim(library: Path, dims: tuple[int, int], dtype: torch.dtype) -> None:
    case = Case(queries=70, keys=100, heads=2, groups=1, head_dim=dims[0], value_dim=dims[1], band_hi=30)
    kernel = Emulator(library)
    run_with_gradients(case, dtype, kernel)
    run_with_gradients(case, dtype, replace(kernel, deterministic=True))
    assert kernel.statistics().bank_conflicts == 0


@pytest.mark.parametrize("architecture", ["sm80", "sm90"])
@pytest.mark.parametrize("seed", range(2, 6))
def test_order_of_warps_does_not_matter(library: Path, architecture: str, seed: int) -> None:
    kernel = Emulator(library, architecture, deterministic=True)
    want = run_with_gradients(CAUSAL, torch.bfloat16, kernel)
    got = run_with_gradients(CAUSAL, torch.bfloat16, replace(kernel, seed=seed))
    for first, second in zip(want, got, strict=True):
        assert torch.equal(first, second)


WRITTEN = (
    Case(
        queries=150, keys=300, heads=4, groups=2, head_dim=64, value_dim=64, band_hi=20
    ),  # some keys are seen by no query
    Case(queries=100, keys=150, heads=4, groups=1, head_dim=64, value_dim=64, ranges="documents"),
    Case(queries=200, keys=70, heads=1, head_dim=64, value_dim=64, band_lo=-20),  # two launches on Hopper
    Case(queries=70, keys=90, heads=1, head_dim=64, value_dim=64, ranges="empty"),
)


@pytest.mark.parametrize("architecture", ["sm80", "sm90"])
@pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "deterministic"])
@pytest.mark.parametrize("case", WRITTEN, ids=lambda case: f"{case.queries}x{case.keys}-{case.ranges}")
def test_results_need_no_initialisation_and_are_rounded_once(
    library: Path, case: Case, deterministic: bool, architecture: str
) -> None:
    kernel = Emulator(library, architecture, deterministic=deterministic)
    q, k, v, dout = inputs(case, torch.bfloat16)
    want = run_kernel(case, (q, k, v, dout), kernel)
    options = {"mask": case.mask(), "softmax_scale": case.softmax_scale, "accumulate": False}
    for dtype in (torch.float32, torch.bfloat16):
        out, lse = torch.full(dout.shape, float("nan"), dtype=dtype), torch.full_like(want[1], float("nan"))
        kernel.forward(q, k, v, out, lse, **options)
        grads = [torch.full(x.shape, float("nan"), dtype=dtype) for x in (q, k, v)]
        kernel.backward(dout, q, k, v, lse, delta(want[0], dout), *grads, **options)
        for name, got, exact in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), want, strict=True):
            assert torch.equal(got, exact.to(got.dtype)), f"{name} in {dtype}"


@pytest.mark.parametrize("architecture", ["sm80", "sm90"])
@pytest.mark.parametrize("size", [{"keys": 0}, {"queries": 0}, {"batch": 0}], ids=str)
def test_empty_calls_write_zeros(library: Path, architecture: str, size: dict[str, int]) -> None:
    case = Case(**{"queries": 70, "keys": 90, "head_dim": 64, "value_dim": 64, **size})
    q, k, v, dout = inputs(case, torch.bfloat16)
    for deterministic in (False, True):
        kernel = Emulator(library, architecture, deterministic=deterministic)
        grads = [torch.full(x.shape, float("nan"), dtype=torch.bfloat16) for x in (q, k, v)]
        rows = torch.zeros(2, case.batch, case.heads, case.queries)
        options = {"mask": case.mask(), "softmax_scale": case.softmax_scale, "accumulate": False}
        kernel.backward(dout, q, k, v, *rows, *grads, **options)
        assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


def test_what_is_added_to_atomically_is_not_rounded(library: Path) -> None:
    case = WRITTEN[1]
    kernel = Emulator(library, "sm90")
    q, k, v, dout = inputs(case, torch.bfloat16)
    results = [torch.zeros(x.shape, dtype=torch.bfloat16) for x in (q, k, v)]
    sums = [x.float() for x in results]
    rows = torch.zeros(2, case.batch, case.heads, case.queries)

    def call(*written: Tensor, deterministic: bool, parts: int) -> None:
        params = kernel.backward_params(
            (dout, q, k, v, *rows), written, case.mask(), case.softmax_scale, False
        )
        kernel.call_backward(params, BackwardOptions(deterministic, parts))

    with pytest.raises(EmulationError, match="dq unless deterministic, dk and dv with several head parts"):
        call(*results, deterministic=False, parts=1)
    with pytest.raises(EmulationError, match="results that blocks add to atomically must be fp32"):
        call(sums[0], *results[1:], deterministic=False, parts=2)
    for deterministic, parts in ((False, 3), (False, 0), (True, 2)):
        with pytest.raises(EmulationError, match="head_parts must divide the query heads"):
            call(*sums, deterministic=deterministic, parts=parts)
    call(*results, deterministic=True, parts=1)


@pytest.mark.parametrize("value_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float32, None], ids=["fp32", "rounded"])
def test_delta_is_the_sum_of_products(
    library: Path, value_dim: int, dtype: torch.dtype, out_dtype: torch.dtype | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    out, dout = torch.randn(2, 19, 2, 3, value_dim, generator=generator)
    packed = torch.zeros(2, 3, 19, 3 * value_dim, dtype=dtype)
    packed[..., value_dim : 2 * value_dim] = dout.permute(1, 2, 0, 3)
    strided = packed[..., value_dim : 2 * value_dim].permute(2, 0, 1, 3)
    out = out.to(out_dtype or dtype)
    got = Emulator(library).delta(out, strided)
    want = (out.double() * strided.double()).sum(-1).permute(1, 2, 0)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_delta_refuses_what_it_does_not_take(library: Path) -> None:
    kernel = Emulator(library)
    x = torch.zeros(3, 1, 2, 64)
    with pytest.raises(EmulationError, match="delta takes dout in bfloat16 or float16"):
        kernel.delta(x, x)
    with pytest.raises(EmulationError, match="out in the same type or float32"):
        kernel.delta(x.half(), x.bfloat16())
    for value_dim in (12, 264):
        with pytest.raises(EmulationError, match="value dims that are multiples of 8 up to 256"):
            kernel.delta(torch.zeros(3, 1, 2, value_dim), torch.zeros(3, 1, 2, value_dim).half())


@pytest.mark.parametrize(
    ("tiles", "units", "bytes_of_unit", "width"),
    [(5, 4, 16384, 4), (5, 7, 16384, 4), (3, 5, 1 << 20, 1), (1, 9, 30000, 2), (4, 3, 0, 3)],
)
def test_every_place_of_the_order_is_taken_once(
    library: Path, tiles: int, units: int, bytes_of_unit: int, width: int
) -> None:
    """Units that fit into the cache together run side by side, tile by tile; then the next units follow."""
    places = (ctypes.c_int * (2 * tiles * units))()
    function = Emulator(library).library.mls_emu_order
    function.argtypes = [*[ctypes.c_int64] * 3, ctypes.c_void_p]
    function.restype = ctypes.c_char_p
    assert function(tiles, units, bytes_of_unit, places) is None
    want = [
        (unit, tile)
        for first in range(0, units, width)
        for tile in range(tiles)
        for unit in range(first, min(first + width, units))
    ]
    assert list(zip(places[::2], places[1::2], strict=True)) == want
    too_many = function(1 << 20, 1 << 11, bytes_of_unit, places)
    assert too_many == b"B * H * Sq is too large for one launch: use fewer heads or sequences per call"


def test_a_refused_tensor_map_is_reported_once_per_kernel(tmp_path: Path, library: Path) -> None:
    fresh = tmp_path / "library.so"  # so that nothing has been reported yet
    shutil.copy(library, fresh)
    kernel = Emulator(fresh, "sm90", refuses_tensor_maps=True)
    for _ in range(2):
        run_with_gradients(CAUSAL, torch.bfloat16, kernel)
    counts = kernel.statistics()
    assert counts.mma > 0
    assert counts.wgmma == 0
    reason = kernel.fallback()
    assert reason is not None
    assert reason.startswith(
        "attention with head dim 64 runs the kernel for compute capability 8.0 on this Hopper"
    )
    assert reason.endswith("of the Hopper kernel: the emulated driver refuses tensor maps")
    run_with_gradients(CAUSAL, torch.bfloat16, kernel)
    assert kernel.fallback() is None


def test_several_tiles_equal_one(library: Path) -> None:
    kernel = Emulator(library)
    tensors = q, k, v, dout = inputs(CAUSAL, torch.bfloat16)
    out = torch.full((CAUSAL.queries, 1, 4, 64), float("nan"))
    lse = torch.full((1, 4, CAUSAL.queries), float("nan"))
    dq, dk, dv = (torch.zeros(x.shape) for x in (q, k, v))
    tiles = [(130, 200), (0, 1), (1, 130)]  # the first leaves many rows empty
    for number, (first, last) in enumerate(tiles):
        options = {"mask": with_keys(CAUSAL, first, last).mask(), "softmax_scale": CAUSAL.softmax_scale}
        kernel.forward(q, k[first:last], v[first:last], out, lse, accumulate=number > 0, **options)
    for first, last in tiles:
        options = {"mask": with_keys(CAUSAL, first, last).mask(), "softmax_scale": CAUSAL.softmax_scale}
        part = slice(first, last)
        kernel.backward(dout, q, k[part], v[part], lse, delta(out, dout), dq, dk[part], dv[part], **options)
    expect_within_budget(CAUSAL, torch.bfloat16, tensors, (out, lse, dq, dk, dv))


def test_strided_inputs_and_results(library: Path) -> None:
    case = Case(queries=66, keys=66, batch=2, head_dim=64, value_dim=64, heads=2, groups=2)
    packed = torch.randn(66, 2, 2, 3, 64).bfloat16()
    q, k, v = (packed[..., i, :] for i in range(3))
    dout = torch.randn(2, 2, 66, 64).bfloat16().permute(2, 0, 1, 3)
    got = run_kernel(case, (q, k, v, dout), Emulator(library))
    want = run_kernel(case, tuple(x.contiguous() for x in (q, k, v, dout)), Emulator(library))
    for first, second in zip(got[:2], want[:2], strict=True):
        assert torch.equal(first, second)
    expect_within_budget(case, torch.bfloat16, (q, k, v, dout), got)


def test_masked_tiles_are_skipped(library: Path) -> None:
    def products(case: Case) -> int:
        kernel = Emulator(library)
        kernel.statistics()  # clears the counts of other tests
        run_kernel(case, inputs(case, torch.bfloat16), kernel)
        return int(kernel.statistics().mma)

    full = Case(queries=512, keys=512, heads=1, head_dim=64, value_dim=64)
    assert products(replace(full, band_hi=0)) < 0.65 * products(full)
    assert products(replace(full, band_hi=0, band_lo=-63)) < 0.4 * products(full)
    documents = replace(full, ranges="documents")
    assert products(documents) < 0.65 * products(full)
    assert products(replace(full, band_lo=600, band_hi=700)) == 0


@pytest.mark.parametrize("deterministic", [False, True], ids=["atomic", "deterministic"])
def test_queries_that_saw_nothing_contribute_nothing(library: Path, deterministic: bool) -> None:
    case = Case(queries=20, keys=20, head_dim=64, value_dim=64)
    q, k, v, dout = inputs(case, torch.bfloat16)
    lse = torch.zeros(1, case.heads, case.queries)
    lse[..., :7] = float("-inf")
    grads = dq, dk, dv = [torch.zeros(x.shape) for x in (q, k, v)]
    options = {"mask": case.mask(), "softmax_scale": case.softmax_scale}
    kernel = Emulator(library, deterministic=deterministic)
    kernel.backward(dout, q, k, v, lse, torch.zeros_like(lse), *grads, **options)
    assert torch.equal(dq[:7], torch.zeros_like(dq[:7]))
    alone = [torch.zeros(x.shape) for x in (q[7:], k, v)]
    options["mask"] = replace(case, queries=13).mask()
    rest = lse[..., 7:].contiguous()
    kernel.backward(dout[7:], q[7:], k, v, rest, torch.zeros_like(rest), *alone, **options)
    torch.testing.assert_close([dk, dv], alone[1:], rtol=1e-4, atol=1e-4)


def test_tile_without_keys_keeps_what_was_there(library: Path) -> None:
    q, k, v, _ = inputs(CAUSAL, torch.bfloat16)
    out, lse = torch.randn(CAUSAL.queries, 1, 4, 64), torch.randn(1, 4, CAUSAL.queries)
    before = out.clone(), lse.clone()
    mask = replace(CAUSAL, band_lo=600, band_hi=700).mask()
    Emulator(library).forward(q, k, v, out, lse, mask=mask, softmax_scale=1.0, accumulate=True)
    assert torch.equal(out, before[0])
    assert torch.equal(lse, before[1])


def test_never_touches_memory_outside_its_tensors(library: Path) -> None:
    """Every tensor ends where an inaccessible page begins, so an access out of bounds raises SIGSEGV."""
    script = Path(__file__).with_name("guarded.py")
    result = subprocess.run(
        [sys.executable, "-m", "tests.cuda.guarded", str(library)],
        cwd=script.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "5 tiles" in result.stdout


def test_machine_refuses_unknown_head_dims(library: Path) -> None:
    case = Case(queries=4, keys=4, head_dim=72, value_dim=72)
    with pytest.raises(EmulationError, match="no kernel for these head dims"):
        run_kernel(case, inputs(case, torch.bfloat16), Emulator(library))
