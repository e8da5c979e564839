"""The overlap benchmark: its predictions, verdicts, reports and refusals. No times are checked."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_lightseq.cli import run
from megatron_lightseq.tools.bench.overlap import MethodTiming, OverlapJob, Speeds, expect
from megatron_lightseq.tools.bench.overlap_report import rows, slowest

# Speeds at which backward's five products take as long as forward's two: one second for each of two zigzag ranks.
JOB = OverlapJob(methods=("zigzag",), seq_length=8, num_heads=1, num_query_groups=1, head_dim=2)
FORWARD_FLOPS = (8 * 9 / 2) / 2 * (4 * 2)
FREE = Speeds(
    forward_flops_per_s=FORWARD_FLOPS,
    backward_flops_per_s=2.5 * FORWARD_FLOPS,
    link_bytes_per_s=1e30,
    link_latency_s=0.0,
)


def test_free_transfers_cost_kernels_only() -> None:
    found = expect(JOB, "zigzag", 2, FREE, overlap=True)
    assert found.seconds == pytest.approx(2.0)
    assert found.exposed_seconds == pytest.approx(0.0)


def test_transfers_without_overlap_are_exposed_in_full() -> None:
    """Forward sends 4 tokens of k and v in fp32; backward sends inputs and results. All are sent after the kernels."""
    forward_bytes = 4 * 2 * 2 * 4
    slow = dataclasses.replace(FREE, link_bytes_per_s=forward_bytes / 10.0)
    off, on = (expect(JOB, "zigzag", 2, slow, overlap=overlap) for overlap in (False, True))
    assert off.seconds == pytest.approx(2.0 + off.exposed_seconds)
    assert off.exposed_seconds >= 20.0, "10 s forward, and no less backward"
    assert 0 < on.exposed_seconds < off.exposed_seconds


def answers(exposed: float, link_bytes_per_s: float) -> list[dict[str, Any]]:
    """Answers of two ranks, of which the second is slightly slower; a step takes 2 s."""
    speeds = dataclasses.asdict(dataclasses.replace(FREE, link_bytes_per_s=link_bytes_per_s))
    measured = [
        MethodTiming(method="zigzag", overlap=overlap, seconds=2.0, exposed_seconds=waited, bytes_sent=64)
        for overlap, waited in ((True, exposed), (False, 1.0))
    ]
    worse = [dataclasses.replace(one, exposed_seconds=one.exposed_seconds * 1.01) for one in measured]
    return [
        {"speeds": speeds, "timings": [dataclasses.asdict(one) for one in of_rank]}
        for of_rank in (measured, worse)
    ]


@pytest.mark.parametrize(
    ("exposed", "link", "verdict", "holds"),
    [
        (0.1, 1e30, "hidden", True),
        (0.199, 1e30, "NOT hidden", False),  # the slower rank is over 10 %
        (1.9, 1.0, "cannot be hidden here", True),
    ],
)
def test_the_verdict_is_of_the_worst_rank(exposed: float, link: float, verdict: str, holds: bool) -> None:
    (row,) = rows(JOB, answers(exposed, link))
    assert row.on.exposed_seconds == pytest.approx(exposed * 1.01)
    assert row.cells()[-1] == verdict
    assert row.holds is holds


def test_a_prediction_uses_the_lowest_speeds() -> None:
    faster = dataclasses.replace(FREE, forward_flops_per_s=FORWARD_FLOPS * 2, link_latency_s=-1.0)
    assert slowest([faster, FREE]) == FREE


def test_two_ranks_measure_and_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--seq-length", "64", "--num-attention-heads", "2", "--kv-channels", "16", "--repetitions", "1"]
    assert run(["bench", "overlap", *sizes, "--methods", "lightseq,ulysses", "--out", str(tmp_path)]) == 0
    assert "64 tokens, 2 heads" in " ".join(capsys.readouterr().out.split())
    record = json.loads((tmp_path / "overlap.json").read_text())
    assert [row["method"] for row in record["rows"]] == ["lightseq", "ulysses"]
    timings = record["answers"][0]["timings"]
    assert [one["overlap"] for one in timings] == [True, False, True, False]
    assert all(one["bytes_sent"] > 0 and one["seconds"] > one["exposed_seconds"] >= 0 for one in timings)
    assert "| lightseq |" in (tmp_path / "overlap.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "warp"], "the methods are lightseq"),
        (["--ranks", "1"], "at least 2 ranks are needed"),
        (["--num-query-groups", "3"], "4 heads in 3 groups"),
        (["--repetitions", "0"], "--repetitions 0: each is 1 or more"),
        (["--seq-length", "8191"], "8191"),
    ],
)
def test_command_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "overlap", *arguments]) == 2
    assert message in capsys.readouterr().err
