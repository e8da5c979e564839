"""The kernel benchmark: its counts, reports and refusals. No times are checked."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_lightseq.cli import run
from megatron_lightseq.kernels.reference import visible
from megatron_lightseq.tools.bench import scaling
from megatron_lightseq.tools.bench.cases import KernelCase, MaskKind, short_document_lengths, standard_cases
from megatron_lightseq.tools.bench.implementations import Inputs, exact_results, implementations
from megatron_lightseq.tools.bench.measure import Row, Timing, measure, measure_errors, peak_gflops
from megatron_lightseq.tools.bench.report import cells, write_reports
from megatron_lightseq.tools.bench.scaling import Scaling, measure_scaling


def small(mask_kind: MaskKind, dtype: torch.dtype = torch.float32, kv_heads: int = 4) -> KernelCase:
    length = sum(short_document_lengths()) if mask_kind == "short documents" else 640
    return KernelCase(
        mask_kind=mask_kind, dtype=dtype, seq_length=length, head_dim=16, num_heads=4, num_kv_heads=kv_heads
    )


@pytest.mark.parametrize("kind", ["full", "causal", "window", "documents"])
def test_flops_count_visible_pairs_only(kind: MaskKind) -> None:
    case = small(kind)
    dense = visible(case.tile_mask(), case.seq_length, case.seq_length, torch.device("cpu"))
    assert case.visible_pairs() == int(dense.sum())
    assert case.flops("forward") == 4 * 4 * 16 * int(dense.sum())
    assert case.flops("backward") == 2.5 * case.flops("forward")


def test_short_documents_cover_the_sequence() -> None:
    case = small("short documents")
    bounds = case.cu_seqlens()
    assert (bounds[0], bounds[-1], len(bounds)) == (0, case.seq_length, 65)
    assert all(16 <= b - a <= 256 for a, b in itertools.pairwise(bounds))
    assert case.visible_pairs() == sum(n * (n + 1) // 2 for n in short_document_lengths())


@pytest.mark.parametrize("kind", ["full", "causal", "window", "documents"])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_implementations_compute_the_same(kind: MaskKind, kv_heads: int) -> None:
    """A benchmark must compare the same computation."""
    case = small(kind, kv_heads=kv_heads)
    for errors in measure_errors(case).values():
        assert max(errors.values()) <= 1e-5


def test_the_loop_over_documents_is_the_packed_attention() -> None:
    case = KernelCase(
        mask_kind="short documents",
        dtype=torch.float32,
        seq_length=9829,
        head_dim=8,
        num_heads=1,
        num_kv_heads=1,
    )
    assert case.seq_length == sum(short_document_lengths())
    ours, torchs = implementations(case, Inputs.random(case))
    for entrant in (ours, torchs):
        entrant.forward()
        entrant.backward()
    for mine, theirs in zip(ours.results(), torchs.results(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_exact_results_are_fp64() -> None:
    case = small("causal")
    assert all(result.dtype == torch.float64 for result in exact_results(case, Inputs.random(case)))


def test_row_and_reports(tmp_path: Path) -> None:
    row = measure(small("causal"), repetitions=1)
    assert [timing.implementation for timing in row.timings] == ["cpu", "torch"]
    assert row.peak_gflops > 1
    paths = write_reports([row], tmp_path, 1)
    assert [path.suffix for path in paths] == [".json", ".md", ".png"]
    written = json.loads(paths[0].read_text())
    assert written["rows"][0]["case"]["dtype"] == "float32"
    assert written["rows"][0]["timings"][0]["forward_s"] == row.timings[0].forward_s
    assert "causal fp32 S=640 D=16 H=4" in paths[1].read_text()
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_ratio_is_torchs_time_over_ours() -> None:
    def timing(name: str, seconds: float) -> Timing:
        return Timing(
            implementation=name,
            forward_s=seconds,
            backward_s=3 * seconds,
            forward_gflops=1 / seconds,
            backward_gflops=2.5 / (3 * seconds),
            errors={"out": 1e-6},
        )

    row = Row(case=small("full"), timings=(timing("cpu", 1.0), timing("torch", 2.5)), peak_gflops=4.0)
    assert row.ratio("forward_s") == 2.5
    assert row.ratio("total_s") == 2.5
    assert cells(row)[1] == "0 -> 1 (2.50x)"
    assert cells(row)[3] == "25% / 21%"


def test_peak_is_above_what_a_product_reaches() -> None:
    assert peak_gflops(torch.float32) > 1
    assert peak_gflops(torch.bfloat16) > 1


def test_standard_cases_have_distinct_names() -> None:
    names = [str(case) for case in standard_cases()]
    assert len(set(names)) == len(names) == 28


def test_scaling_runs_the_kernel_on_one_thread_and_on_many(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    on: list[int] = []

    def timed(call: Callable[[], None]) -> float:
        call()
        on.append(torch.get_num_threads())
        return float(len(on))

    monkeypatch.setattr(scaling, "timed", timed)
    row = measure_scaling(small("causal"), 3, repetitions=2)
    assert on == [1, 1, 3, 3] * 3, "the first round is not counted"
    assert (row.forward_s, row.backward_s) == ((7.0, 9.0), (8.0, 10.0)), "medians of (5, 9), (7, 11), ..."
    assert torch.get_num_threads() == before


def test_scaling_reports(tmp_path: Path) -> None:
    row = Scaling(case=small("full"), threads=2, forward_s=(0.2, 0.1), backward_s=(0.5, 0.3))
    assert row.cells()[1:] == ["200 -> 100 ms (2.00x)", "500 -> 300 ms (1.67x)", "700 -> 400 ms (1.75x)"]
    record, table = (path.read_text() for path in scaling.write_reports([row], tmp_path, 5))
    assert json.loads(record)["rows"][0]["forward_s"] == [0.2, 0.1]
    assert "| full fp32 S=640 D=16 H=4 | 200 -> 100 ms (2.00x) |" in table
    assert "on 1 -> 2 threads" in table


def test_a_single_head_is_among_the_scaling_cases() -> None:
    assert any(case.num_heads == case.num_kv_heads == 1 for case in scaling.scaling_cases())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kernel", "--threads", "0"], "--threads 0, --repetitions 5: each is 1 or more"),
        (["kernel", "--only", "no such case"], "--only 'no such case': no case has this text in its name"),
        (["scaling", "--threads", "0"], "--threads 0, --repetitions 5: each is 1 or more"),
        (["scaling", "--only", "no such case"], "--only 'no such case': no case has this text in its name"),
    ],
)
def test_command_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
