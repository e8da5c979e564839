"""The GPU benchmark, run on the CPU: all implementations compute the same attention, and the report is complete."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._functorch import config as functorch

from megatron_lightseq.kernels.cpu import CpuKernel
from megatron_lightseq.kernels.specs import CUDA_HEAD_DIMS as HEAD_DIMS
from megatron_lightseq.tools.bench import gpu
from megatron_lightseq.tools.bench.gpu import LEFT_OUT, Benchmark, cases, main, run
from megatron_lightseq.tools.bench.gpu_implementations import Flex, GpuCase, GpuImplementation, Ours, Sdpa
from megatron_lightseq.tools.bench.gpu_model import BACKWARD, FORWARD, costs, predicted_tflops
from megatron_lightseq.tools.bench.gpu_report import Measured, Report, goals, table, write_report

CPU = torch.device("cpu")
CSRC = Path(__file__).resolve().parents[2] / "csrc"
CASE = GpuCase(seq_length=64, head_dim=64, causal=True, kv_share=2, tokens=128, width=256)
SHAPES = [CASE, replace(CASE, causal=False), replace(CASE, kv_share=1, seq_length=128)]
REPORT = Report(
    environment={"device": "some GPU", "commit": "abc"},
    ceilings={"matmul_tflops": 800.0},
    checks=("build=ok",),
)


def untimed(call: Callable[[], object]) -> float:
    call()
    return 1e-3


def stand_in(_: object) -> Callable[..., Tensor]:
    """Replaces the compiled flex_attention, which has no backward on CPUs and takes long to compile."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *, block_mask: object, enable_gqa: bool) -> Tensor:
        causal = block_mask is not None
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=enable_gqa
        )

    return attend


FLEX = Flex(stand_in)
BENCHMARK = Benchmark(device=CPU, timer=untimed)


def results_of(implementation: GpuImplementation, case: GpuCase) -> list[Tensor]:
    """out, dq, dk, dv in (S, B, H, D)."""
    torch.manual_seed(0)
    tensors = case.tensors(CPU)
    with implementation.settings():
        forward: Any = implementation.forward(case, tensors)()
        grads: Any = implementation.backward(case, tensors)()
    if isinstance(implementation, Ours):
        return [forward[0].float(), *(x.float() for x in grads)]
    return [x.float().permute(2, 0, 1, 3) for x in (forward, *grads)]


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_all_implementations_compute_the_same(case: GpuCase) -> None:
    want = results_of(Ours(CpuKernel()), case)
    others: list[GpuImplementation] = [
        Ours(CpuKernel(), 4),
        Ours(CpuKernel(), is_alone=True),
        Sdpa("sdpa-flash"),
        FLEX,
    ]
    for other in others:
        for first, second in zip(results_of(other, case), want, strict=True):
            assert (first - second).norm() <= 2e-2 * second.norm(), other.name


def test_flex_attention_computes_the_same_forward() -> None:
    torch.manual_seed(0)
    tensors = CASE.tensors(CPU)
    out = Flex(lambda function: function).forward(CASE, tensors)()
    want = Sdpa("sdpa-flash").forward(CASE, tensors)()
    assert isinstance(out, Tensor)
    assert isinstance(want, Tensor)
    assert (out - want).norm() <= 2e-2 * want.norm()


def test_compiled_backwards_can_be_timed_again_and_again() -> None:
    """By default, torch lets a compiled backward pass overwrite tensors saved by forward, so it can run only once."""
    assert functorch.donated_buffer
    with FLEX.settings():
        assert not functorch.donated_buffer
    assert functorch.donated_buffer


def test_repeated_keys_and_values_give_the_same_output() -> None:
    torch.manual_seed(0)
    tensors = CASE.tensors(CPU)
    calls = [Sdpa("sdpa-flash", repeat=repeat).forward(CASE, tensors) for repeat in (False, True)]
    first, second = (call() for call in calls)
    torch.testing.assert_close(first, second)


def test_what_does_not_run_is_a_row_with_its_reason(tmp_path: Path) -> None:
    saved: list[int] = []
    found = run(BENCHMARK, SHAPES, Ours(CpuKernel()), FLEX, lambda rows: saved.append(len(rows)))
    assert saved == [5, 10, 15, 16, 17, 18]
    by_name = {(one.case, one.implementation): one for one in found}
    for case in SHAPES:
        for name in ("ours", "ours, kernel alone", "ours, 4 blocks", "sdpa-flash", "flex (Triton)"):
            one = by_name[case, name]
            assert (one.forward_s, one.backward_s, one.note) == (1e-3, 1e-3, "")
        cudnn = "sdpa-cudnn" if case.kv_share == 1 else "sdpa-cudnn, K and V repeated"
        assert by_name[case, cudnn].forward_s is None
        assert by_name[case, cudnn].note.startswith("forward: RuntimeError: ")
    write_report(REPORT, found, tmp_path)
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["environment"]["commit"] == "abc"
    assert len(content["results"]) == len(found)
    text = (tmp_path / "gpu.md").read_text()
    assert "- build=ok" in text
    assert text.count("RuntimeError") == 2 * len(SHAPES)


def test_a_backward_that_fails_keeps_the_forward() -> None:
    class Broken(Sdpa):
        def backward(self, *_: object) -> Callable[[], object]:
            raise RuntimeError("no backward\nat all")

    one = BENCHMARK.measure(CASE, Broken("sdpa-flash"))
    assert (one.forward_s, one.backward_s) == (1e-3, None)
    assert one.note == "backward: RuntimeError: no backward"


def test_nothing_starts_after_the_end() -> None:
    ticks = itertools.count()
    benchmark = replace(BENCHMARK, clock=lambda: float(next(ticks)), end=2.5)
    found = run(benchmark, SHAPES, Ours(CpuKernel()), FLEX, lambda _: None)
    done = [one for one in found if one.note == ""]
    assert [one.implementation for one in done] == ["ours"]
    assert {one.note for one in found[1:]} == {LEFT_OUT}
    assert len(found) == 6 * len(SHAPES)


def test_flex_says_where_it_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    long = replace(CASE, seq_length=32768)
    assert "at most 16384 tokens" in BENCHMARK.measure(replace(long, width=64), FLEX).note
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert Flex()._refusal(CASE, torch.device("cuda")) == "it needs Triton, which is not installed"


def test_cases_are_those_of_the_papers() -> None:
    shapes = list(cases(gpu.SEQ_LENGTHS))
    assert len(shapes) == 5 * 2 * 2 * 2
    assert shapes[0].seq_length == 16384
    for case in shapes:
        assert case.heads * case.head_dim == 2048
        assert case.batch * case.seq_length == max(16384, case.seq_length)
    assert (
        GpuCase(seq_length=1024, head_dim=64, causal=False, kv_share=1).forward_flops
        == 4.0 * 16 * 2**20 * 2048
    )


def test_ceilings_are_rates() -> None:
    assert BENCHMARK.ceilings(matrix=8, elements=16) == {
        "matmul_tflops": pytest.approx(2 * 8**3 / 1e-3 / 1e12),
        "copy_tbytes_per_s": pytest.approx(2 * 64 / 1e-3 / 1e12),
    }


def rows(ours: float, blocks: float, best: float, other: float) -> list[Measured]:
    case = GpuCase(seq_length=16384, head_dim=128, causal=True, kv_share=1)
    times = {
        "ours": ours,
        "ours, 4 blocks": blocks,
        "sdpa-cudnn": best,
        "sdpa-flash": other,
        "flex (Triton)": 1e-9,
    }
    return [
        Measured(case=case, implementation=name, is_ours="ours" in name, forward_s=s, backward_s=s)
        for name, s in times.items()
    ]


def test_goals_are_judged_by_the_fastest_backend() -> None:
    reached = goals(rows(ours=1.0, blocks=1.04, best=0.95, other=2.0))
    assert reached == [
        "forward, D = 128, causal, rate relative to torch's fastest: 0.95 to 0.95 (goal: at least 0.9): reached",
        "backward, D = 128, causal, rate relative to torch's fastest: 0.95 to 0.95 (goal: at least 0.85): reached",
        "forward, time of 4 blocks relative to one call, long sequences: 1.04 to 1.04 (goal: at most 1.05): reached",
        "backward, time of 4 blocks relative to one call, long sequences: 1.04 to 1.04 (goal: at most 1.05): reached",
    ]
    missed = goals(rows(ours=1.0, blocks=1.06, best=0.87, other=2.0))
    assert [line.rpartition(": ")[2] for line in missed] == [
        "NOT reached",
        "reached",
        "NOT reached",
        "NOT reached",
    ]
    silent = [replace(one, forward_s=None, backward_s=None) for one in rows(1.0, 1.0, 1.0, 1.0)]
    assert all(": not measured (" in line for line in goals(silent))


def test_table_shows_rates_and_reasons() -> None:
    results = rows(ours=0.01, blocks=0.01, best=0.005, other=0.02)
    results[3] = replace(results[3], forward_s=None, note="forward: no | way")
    slow, fast = predicted_tflops("forward", 128) or (0, 0)
    assert f"| {slow:.0f} to {fast:.0f} |" in table(results, 800.0, is_hopper=True).splitlines()[2]
    lines = table(results, 800.0).splitlines()
    assert len(lines) == 2 + 2 * len(results)
    flops = results[0].case.forward_flops / 1e12
    assert f"| 128 | causal | MHA | 16384 | forward | ours | 10.000 | {flops / 0.01:.0f} | - |" in lines[2]
    assert lines[2].endswith("| 0.50 |")
    assert "| sdpa-flash | - | forward: no / way | - | - | - |" in lines[5]


def test_predictions_are_for_the_tiles_that_are_compiled() -> None:
    text = (CSRC / "cuda" / "sm90_instances.h").read_text()
    pattern = (
        r"struct HopperForwardSizes(?:<(\d+), (\d+)>)? \{"
        r"\s*static constexpr int kConsumers = (\d), kKeys = (\d+);"
    )
    sizes = {(int(d or 0), int(dv or 0)): (int(c), int(k)) for d, dv, c, k in re.findall(pattern, text)}
    assert len(sizes) == 3
    assert {dims: sizes.get(dims, sizes[0, 0]) for dims in HEAD_DIMS} == FORWARD
    instances = (CSRC / "cuda" / "instances.h").read_text()
    hopper = re.search(r"define MLS_FOR_EACH_HOPPER_BACKWARD_HEAD_DIM\(X\) (.*)", instances)
    assert hopper is not None
    assert tuple(int(dim) for dim in re.findall(r"X\((\d+),", hopper[1])) == BACKWARD


def test_predictions_bracket_what_flashattention_3_reaches() -> None:
    published = {
        ("forward", 64): 497,
        ("forward", 128): 648,
        ("backward", 64): 474,
        ("backward", 128): 561,
    }
    for (direction, head_dim), rate in published.items():
        slow, fast = predicted_tflops(direction, head_dim) or (0, 0)
        assert slow < rate < 1.01 * fast
    assert predicted_tflops("backward", 256) is None
    for cost in costs():
        assert 0.5 < cost.ceiling <= 1


class SmallBenchmark(Benchmark):
    """Like the real benchmark, but on this CPU and with small ceilings."""

    def __init__(self, *, device: torch.device, end: float) -> None:
        assert device.type == "cuda"
        super().__init__(device=CPU, timer=untimed, end=end)

    def ceilings(self, matrix: int = 8, elements: int = 16) -> dict[str, float]:
        return Benchmark.ceilings(self, matrix, elements)


def test_one_command_measures_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(
        torch.backends.cudnn, "version", lambda: None
    )  # with a CUDA build of torch it looks at all GPUs
    for name, value in {
        "Benchmark": SmallBenchmark,
        "CudaKernel": CpuKernel,
        "Flex": lambda: FLEX,
        "cases": lambda lengths: SHAPES,
        "warm_up": lambda device: None,
    }.items():
        monkeypatch.setattr(gpu, name, value)
    arguments = [
        "--out",
        str(tmp_path),
        "--seconds",
        "600",
        "--commit",
        "abc",
        "--checks",
        "build=ok",
        "ranks=ok",
    ]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "- device: A GPU" in said
    assert "- forward, D = 64, causal, rate relative to torch's fastest: 1.00 to 1.00" in said
    assert said.endswith(f"Table: {tmp_path / 'gpu.md'}\n")
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["checks"] == ["build=ok", "ranks=ok"]
    assert content["environment"]["capability"] == "9.0"
    monkeypatch.setattr(CpuKernel, "forward", None)  # a kernel of ours that fails
    assert main(arguments) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path)]) == 2
    assert "torch finds no GPU" in capsys.readouterr().err
