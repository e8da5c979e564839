"""Traces: what is recorded, what is predicted from it, and that a traced step is the same step."""

from __future__ import annotations

import json
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron_lightseq import SequenceLayout, dist_linear_attention
from megatron_lightseq.attention import DistAttention
from megatron_lightseq.attention.trace import HostClock, Trace
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule import Direction, Network, build, simulate
from megatron_lightseq.schedule.simulate import Costs
from megatron_lightseq.training.tracing import chrome, gather
from megatron_lightseq.training.tracing.predict import Compared, compare, describe, typical
from megatron_lightseq.training.tracing.times import RankTimes, read_trace
from megatron_lightseq.transport import connect, run_loopback
from tests.harness.ranks import run_ranks
from tests.megatron.runs import TINY, VOCAB_SIZE, batches

LENGTH, HEADS, WIDTH = 24, 4, 8
NETWORK = Network(name="test", link_bytes_per_s=1e6, link_latency_s=1e-3)


def _traced(size: int, method: str, mask: Mask) -> tuple[list[RankTimes], list[int]]:
    """Attention, forward and backward, on threads: the traces of all ranks, and the bytes that they sent."""

    def one_rank(group: Any) -> tuple[RankTimes, int]:
        attend = DistAttention(group, method=method, mask=mask)
        attend.stats.trace = trace = Trace(HostClock())
        q, k, v = (torch.randn(LENGTH, 1, HEADS, WIDTH, requires_grad=True) for _ in range(3))
        with trace.region("outer"), trace.region("inner"):
            attend(q, k, v).sum().backward()
        rank = group.rank()
        times = read_trace(trace, rank=rank, peers=range(size), host="here", link=(1e-3, 1e6))
        return times, attend.stats.bytes_sent

    found = run_loopback(size, one_rank)
    return [times for times, _ in found], [sent for _, sent in found]


@pytest.mark.parametrize(
    ("size", "method"), [(1, "lightseq"), (3, "lightseq"), (4, "balanced"), (4, "usp:2"), (2, "ulysses")]
)
def test_every_step_and_transfer_is_recorded_once(size: int, method: str) -> None:
    mask = Mask.documents((0, 7, 30, size * LENGTH)) if size > 1 else Mask.causal()
    ranks, sent = _traced(size, method, mask)
    positions = range(size * LENGTH)
    heads_shared = 2 if method == "usp:2" else size if method == "ulysses" else 1
    for direction in Direction:
        executions = [each for rank in ranks for each in rank.executions if each.kind == direction]
        assert len(executions) == size
        assert {each.inside for each in executions} == {"inner"}
        pairs = sum(step.pairs for each in executions for step in each.steps)
        assert pairs == heads_shared * mask.area(positions, positions)
    if heads_shared == 1:  # the exchange of heads belongs to no step
        recorded = [
            sum(size for each in rank.executions for step in each.steps for _, size in step.sends)
            for rank in ranks
        ]
        assert recorded == sent
    else:
        assert {"heads for tokens", "tokens for heads"} <= {region.name for region in ranks[0].regions}


def test_moments_of_a_step_are_in_order() -> None:
    for rank in _traced(3, "lightseq", Mask.causal())[0]:
        for execution in rank.executions:
            last = 0.0
            for step in execution.steps:
                moments = [step.began, *(at for call in step.calls for at in (call.began, call.ended))]
                moments += [step.computed, step.ended]
                assert moments == sorted(moments)
                assert moments[0] >= last
                last = step.ended


def test_scans_are_recorded() -> None:
    trace = Trace(HostClock())

    def one_rank(group: Any) -> None:
        from megatron_lightseq.linear import distributed

        q, k, v = (torch.randn(LENGTH, 1, 2, WIDTH) for _ in range(3))
        dist_linear_attention(q, k, v, group=group)
        if group.rank() == 1:
            known = next(iter(distributed._ATTENTIONS[group].values()))
            known.stats.trace = trace
        dist_linear_attention(q, k, v, group=group)

    run_loopback(2, one_rank)
    assert [each.kind for each in trace.executions] == ["forward scan"]


# ---- prediction ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lightseq", "ring", "balanced"])
def test_predictions_are_those_of_the_schedule(method: str) -> None:
    size, mask = 4, Mask.causal()
    ranks, _ = _traced(size, method, mask)
    for each in compare(_begun_together(ranks), NETWORK):
        direction = Direction(each.kind)
        layout = SequenceLayout.contiguous(size)
        schedule = build(
            method, layout, mask=mask, seq_length=size * LENGTH, direction=direction, shape=_shape()
        )
        seconds = sum(step.kernel_s for rank in each.measured for step in rank.steps)
        pairs = sum(step.pairs for rank in each.measured for step in rank.steps)
        costs = Costs(seconds_per_pair=seconds / pairs, network=NETWORK)
        expected = simulate(schedule, costs, _shape())
        assert each.predicted.makespan_s == pytest.approx(expected.makespan_s)
        assert each.predicted.bytes_sent == expected.bytes_sent
        assert each.predicted.steps == tuple(
            tuple(pytest.approx(moment) for moment in row) for row in expected.steps
        )


def _shape() -> Any:
    from megatron_lightseq.schedule.shape import TensorShape

    return TensorShape(num_heads=HEADS, num_query_groups=HEADS, head_dim=WIDTH, element_bytes=4)


def _begun_together(ranks: list[RankTimes]) -> list[RankTimes]:
    """As if every execution had begun at the same moment on all ranks."""
    found = []
    for rank in ranks:
        executions = tuple(
            replace(each, steps=(replace(each.steps[0], began=float(index)), *each.steps[1:]))
            for index, each in enumerate(rank.executions)
        )
        found.append(replace(rank, executions=executions))
    return found


def test_a_rank_that_begins_late_is_predicted_to_keep_others_waiting() -> None:
    ranks = _begun_together(_traced(2, "ring", Mask.full())[0])
    together = compare(ranks, NETWORK)[0].predicted
    first, *others = ranks[0].executions
    late = replace(first, steps=(replace(first.steps[0], began=5.0), *first.steps[1:]))
    apart = compare([replace(ranks[0], executions=(late, *others)), ranks[1]], NETWORK)[0].predicted
    assert apart.makespan_s == pytest.approx(together.makespan_s + 5.0)
    assert apart.exposed_s > together.exposed_s + 4.9


# ---- the file -----------------------------------------------------------------------------------------------------


def _events(path: Path) -> list[dict[str, Any]]:
    return list(json.loads(path.read_text(encoding="utf-8"))["traceEvents"])


def test_the_file_holds_all_ranks_and_lanes_and_nests(tmp_path: Path) -> None:
    ranks, _ = _traced(3, "lightseq", Mask.causal())
    compared = compare(ranks, NETWORK)
    chrome.write(tmp_path / "new" / "trace.json", ranks, compared)
    events = _events(tmp_path / "new" / "trace.json")
    shown = [event for event in events if event["ph"] == "X"]
    assert min(event["ts"] for event in shown) == 0
    lanes = {(event["pid"], event["tid"]) for event in shown}
    assert lanes >= {(rank, lane) for rank in range(3) for lane in range(4)}
    for rank, lane in lanes:
        if lane != chrome.TRANSFERS:
            _check_nesting([event for event in shown if (event["pid"], event["tid"]) == (rank, lane)])
    sent = sum(event["args"]["bytes"] for event in shown if event["tid"] == chrome.TRANSFERS)
    assert sent == sum(
        size for r in ranks for e in r.executions for step in e.steps for _, size in step.sends
    )


def _check_nesting(events: list[dict[str, Any]]) -> None:
    """Viewers show events of one lane only if each lies within those that are open when it begins."""
    open_until: list[float] = []
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        while open_until and open_until[-1] <= event["ts"] + 2e-3:
            open_until.pop()
        ends = event["ts"] + event["dur"]
        assert not open_until or ends <= open_until[-1] + 2e-3
        open_until.append(ends)


def test_the_median_execution_is_drawn_and_described(tmp_path: Path) -> None:
    from megatron_lightseq.training.tracing.picture import draw_trace

    compared = compare(_traced(2, "lightseq", Mask.causal())[0], NETWORK)
    chosen: dict[str, Compared] = typical(compared)
    assert list(chosen) == ["forward", "backward"]
    draw_trace(chosen, tmp_path / "trace.png")
    assert (tmp_path / "trace.png").stat().st_size > 10_000
    lines = describe(compared)
    assert [line.split(":")[0] for line in lines] == ["forward", "backward"]


# ---- clocks -------------------------------------------------------------------------------------------------------


def _on_two_hosts(ahead_s: float) -> list[str]:
    """A trace whose only region begins now; ranks 2 and 3 are on a host whose clock is ahead."""
    import torch.distributed as dist

    rank, real = dist.get_rank(), time.perf_counter
    remote = rank >= 2
    with patch.object(time, "perf_counter", lambda: real() + (ahead_s if remote else 0.0)):
        trace = Trace(HostClock())
        dist.barrier()
        with trace.region("now"):
            pass
        group = dist.group.WORLD
        assert group is not None
        link = gather.measure_link(connect(group), torch.device("cpu"))
        mine = read_trace(trace, rank=rank, peers=range(4), host=f"host {int(remote)}", link=link)
        return [each.to_json() for each in gather.gather(mine, torch.device("cpu"))]


def test_clocks_of_other_hosts_are_aligned() -> None:
    first, *others = run_ranks(4, _on_two_hosts, 1000.0)
    assert others == [[], [], []]
    found = [RankTimes.from_json(text) for text in first]
    assert [each.rank for each in found] == [0, 1, 2, 3]
    moments = [each.regions[0].began for each in found]
    assert max(moments) - min(moments) < 5.0
    assert all(each.latency_s > 0 and each.bytes_per_s > 0 for each in found)


# ---- in a run -----------------------------------------------------------------------------------------------------


def _run(settings: dict[str, Any], folder: str | None) -> tuple[list[float], list[str], bool]:
    """Losses of four steps, of which the second and third are traced; the lines; whether everything was undone."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    from megatron.core import parallel_state

    from megatron_lightseq.config import PretrainConfig, with_values
    from megatron_lightseq.megatron.cpu import platform as cpu_platform
    from megatron_lightseq.training.setup import build_training
    from megatron_lightseq.training.step import train_step
    from megatron_lightseq.training.tracing.window import Tracing

    cpu_platform.activate()
    steps = {"train_iters": 4} | (
        {"trace": folder, "trace_step_start": 2, "trace_step_end": 3} if folder else {}
    )
    try:
        training = build_training(
            with_values(PretrainConfig(), **{**TINY, **settings, **steps}), vocab_size=VOCAB_SIZE
        )
        modules = [module for model in training.models for module in model.modules()]
        before = _hooks(modules)
        tracing, losses, lines = Tracing(training), [], []
        for step in range(1, 5):
            with tracing.step(step):
                losses.append(train_step(training, [batches(training, step) for _ in training.chunks]).loss)
            lines += tracing.finish() if tracing.ends_with(step) else []
        clean = training.attention_stats.trace is None and training.model_config.timers is None
        return losses, lines + tracing.finish(), clean and _hooks(modules) == before
    finally:
        parallel_state.destroy_model_parallel()


def _hooks(modules: list[Any]) -> list[int]:
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules]


@pytest.mark.parametrize(
    "settings",
    [
        {"context_parallel_size": 2, "pipeline_model_parallel_size": 2},
        {
            "context_parallel_size": 2,
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    ],
    ids=["cp 2 x pp 2", "recomputed"],
)
def test_traced_steps_are_the_same_steps(settings: dict[str, Any], tmp_path: Path) -> None:
    size = 2 * settings.get("pipeline_model_parallel_size", 1)
    plain = run_ranks(size, _run, settings, None)
    traced = run_ranks(size, _run, settings, str(tmp_path))
    for (expected, _, _), (losses, lines, clean) in zip(plain, traced, strict=True):
        assert losses == expected
        assert clean
        assert bool(lines) == (lines is traced[0][1])
    assert traced[0][1][0] == f"trace of steps 2-3: {tmp_path / 'trace.json'}"
    assert (tmp_path / "trace.png").exists()
    events = _events(tmp_path / "trace.json")
    attention = {event["name"] for event in events if event.get("tid") == chrome.STEPS and event["ph"] == "X"}
    assert attention >= {f"{way} in layer {number}" for way in Direction for number in (1, 2, 3, 4)}
    regions = [event for event in events if event.get("tid") == chrome.REGIONS]
    names = Counter(event["name"] for event in regions if event["ph"] == "X")
    assert names["step 2"] == names["step 3"] == size
    assert not names["step 1"]
    for name in ("forward-backward", "forward-compute", "backward-compute", "embedding", "layer 1 attention"):
        assert names[name], name
