"""Which systems can be compared, and which comparisons are refused."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_lightseq.config import PretrainConfig, with_values
from megatron_lightseq.tools.compare import report
from megatron_lightseq.tools.compare.job import Job, JobResult, Measurement, StepMeasurement
from megatron_lightseq.tools.compare.paper.show import show_paper
from megatron_lightseq.tools.compare.summary import summary
from megatron_lightseq.tools.compare.tables import Comparison, compare


def step(seconds: float, loss: float, **more: Any) -> StepMeasurement:
    fields = {
        "cpu_seconds": seconds / 2,
        "bytes_sent": 1000,
        "attention_bytes_sent": 600,
        "exposed_seconds": 0.25,
        "attention_forwards": 4,
        "link_bytes_sent": None,
        "warmup": False,
    }
    return StepMeasurement(seconds=seconds, loss=loss, **{**fields, **more})


def rank(*steps: StepMeasurement, **more: Any) -> Measurement:
    fields = {
        "peak_resident_bytes": 300 << 20,
        "peak_tensor_bytes": 8 << 20,
        "matmul_flops_per_second": 1e10,
        "counts_forwards": True,
    }
    return Measurement(steps=steps, **{**fields, **more})


def result(system: str, seconds: float, loss: float) -> JobResult:
    """Two ranks, a warm-up step and three timed steps. The median step takes ``seconds`` on the slower rank."""
    slow = [step(99.0, 5.0, warmup=True), *(step(seconds + d, loss) for d in (-0.25, 0.25, 0.0))]
    fast = [step(99.0, 5.0, warmup=True), *(step(seconds / 2, loss) for _ in range(3))]
    return JobResult(system=system, ranks=(rank(*fast), rank(*slow, peak_resident_bytes=400 << 20)))


def job(**values: Any) -> Job:
    return Job(system="lightseq", common=with_values(PretrainConfig(), **values), world_size=2)


def compared(*results: JobResult, **values: Any) -> Comparison:
    return compare(job(**values), results, "megatron-tp-sp", 256)


def text_of(comparison: Comparison) -> str:
    stream = io.StringIO()
    Console(file=stream, width=250).print(report.terminal_table(comparison))
    return stream.getvalue()


def test_speedup_is_by_the_median_step_of_the_slowest_rank() -> None:
    found = compared(result("megatron-tp-sp", 4.0, 4.5), result("lightseq", 2.0, 4.5))
    megatron, ours = found.figures
    assert found.agrees
    assert ours.step_seconds == (1.75, 2.25, 2.0)
    assert ours.cpu_seconds == 1.0
    assert found.speedup(ours) == 2.0
    assert megatron.tokens_per_second == 4096 / 4.0
    assert megatron.peak_resident_bytes == 400 << 20
    assert megatron.ceiling_fraction == pytest.approx(megatron.flops_per_second / 2e10)
    assert "2.00x" in text_of(found)


@pytest.mark.parametrize("loss", [4.5 * (1 + 2e-4), 4.5 * (1 - 2e-4), math.nan])
def test_no_speedup_where_losses_differ(loss: float) -> None:
    found = compared(result("megatron-tp-sp", 4.0, 4.5), result("lightseq", 2.0, loss))
    assert not found.agrees
    assert found.speedup(found.figures[1]) is None
    shown = text_of(found)
    assert "refused: loss differs" in shown
    assert "2.00x" not in shown
    assert "2.00x" not in report.markdown(found)
    assert "at step 1, megatron-tp-sp has 4.500000" in report.verdict(found)
    assert report.verdict(found).startswith("NOT comparable")


def test_bf16_has_a_larger_tolerance() -> None:
    pair = (result("megatron-tp-sp", 4.0, 4.5), result("lightseq", 2.0, 4.5 * 1.005))
    assert compared(*pair, bf16=True).agrees
    assert not compared(*pair).agrees


def test_a_failure_is_a_disagreement_and_a_refusal_is_not() -> None:
    base = result("megatron-tp-sp", 4.0, 4.5)
    refused = compared(base, JobResult(system="megatron-cp", refusal="no Transformer Engine"))
    assert refused.agrees
    assert "cannot run here: no Transformer Engine" in text_of(refused)
    failed = compared(base, JobResult(system="lightseq", failure="rank 1: exit status 1\nsome traceback"))
    assert not failed.agrees
    assert "lightseq failed: rank 1: exit status 1" in report.verdict(failed)


def test_rounds_are_put_together() -> None:
    found = compared(
        result("megatron-tp-sp", 4.0, 4.5), result("lightseq", 2.0, 4.5), result("lightseq", 3.0, 4.5)
    )
    assert found.figures[1].step_seconds == (1.75, 2.25, 2.0, 2.75, 3.25, 3.0)
    assert found.figures[1].median_seconds == 2.5


def test_everything_is_written(tmp_path: Path) -> None:
    found = compared(result("megatron-tp-sp", 4.0, 4.5), result("lightseq", 2.0, 4.5))
    paths = report.write(found, tmp_path / "new", "both")
    record = json.loads(paths[0].read_text())
    assert record["figures"][1]["speedup"] == 2.0
    assert record["agrees"] is True
    assert "losses agree" in paths[1].read_text()
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_jobs_survive_their_file() -> None:
    made = job(recompute_granularity="full", recompute_modules=("core_attn", "mlp"), data_path=("a",))
    assert Job.from_json(made.to_json()) == made


def test_summary_takes_its_figures_from_the_records(tmp_path: Path) -> None:
    fast = compared(result("megatron-tp-sp", 4.0, 4.5), result("lightseq", 2.0, 4.5)).to_dict()
    wrong = compared(result("megatron-tp-sp", 4.0, 4.5), result("lightseq", 2.0, 4.0)).to_dict()
    length = {"row": "2", "what": "longest", "here": "4x: 16K against 4K; Megatron padded: 16K"}
    records = {
        "long-fp32": fast,
        "long-bf16": wrong,
        "two-hosts": {"1": fast},
        "paper-rows": {"rows": [length]},
    }
    for name, record in records.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    assert show_paper(Console(file=io.StringIO()), tmp_path) == 0
    assert summary(tmp_path).splitlines()[2:] == [
        "| two processes, 8 heads, 4096 tokens, fp32 | 1,024 tokens/s | 2,048 tokens/s | 2.00x |",
        "| two processes, 8 heads, 4096 tokens, bf16 | 1,024 tokens/s | 2,048 tokens/s | refused: loss differs |",
        "| two hosts at 1 Gbit/s, 8 heads, 4096 tokens | 1,024 tokens/s | 2,048 tokens/s | 2.00x |",
        "| longest | 4K tokens | 16K tokens | 4x |",
        "| predicted for 8 and 16 A100, 18 cells of the paper's Table 1 | - | - | 1.14-1.89x |",
    ]
    assert len(summary(tmp_path / "empty").splitlines()) == 2
