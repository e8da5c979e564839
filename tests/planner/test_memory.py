"""Memory by running on fake tensors, against memory of real runs."""

from __future__ import annotations

import gc
import json
from contextlib import nullcontext
from pathlib import Path
from types import FrameType

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_lightseq.config.flat import with_values
from megatron_lightseq.megatron.cpu import platform as cpu_platform
from megatron_lightseq.tools.memory import live_tensor_bytes, peak_tensor_bytes
from megatron_lightseq.tools.planner import memory
from megatron_lightseq.tools.planner.cases import CASES, VOCAB_SIZE, Case
from megatron_lightseq.tools.planner.fake_world import fake_world
from megatron_lightseq.tools.planner.ledger import Ledger
from megatron_lightseq.tools.planner.measured import plan
from megatron_lightseq.tools.planner.memory import rank_memory
from megatron_lightseq.tools.planner.purposes import PURPOSES
from megatron_lightseq.tools.planner.trace import batches, trace
from megatron_lightseq.training.setup import build_training
from megatron_lightseq.training.step import train_step
from tests.harness.ranks import run_ranks

RESULT = json.loads((Path(__file__).parents[2] / "docs/results/plan-memory.json").read_text())
BY_NAME = {case.name: case for case in CASES}


def test_committed_comparison_reaches_its_goals() -> None:
    assert {run["name"] for run in RESULT["by_run"]} == set(BY_NAME)
    assert RESULT["runs"] == len(CASES) >= 24
    assert RESULT["median_error"] <= 0.03
    assert RESULT["worst_error"] <= 0.10


@pytest.mark.parametrize(
    "name",
    [
        "bf16, full recompute, slices",
        "pp2",
        "cp3 lightseq",
        "experts, ep2",
        "dp2, distributed optimizer, bf16",
    ],
)
def test_plans_are_still_those_of_the_committed_comparison(name: str) -> None:
    committed = next(run for run in RESULT["by_run"] if run["name"] == name)
    assert plan(BY_NAME[name]) == pytest.approx(committed["measured"], rel=0.1)
    assert plan(BY_NAME[name]) == pytest.approx(committed["planned"], rel=0.02)


@pytest.mark.parametrize("name", ["bf16", "cp2 lightseq"])
def test_plan_is_what_is_measured_here(name: str) -> None:
    case = BY_NAME[name]
    assert plan(case) == pytest.approx(run_ranks(case.world_size, _measure, case), rel=0.03)


def _measure(case: Case) -> int:
    """Peak of tensors in the second step, without those that earlier tests have left in this process."""
    torch.set_num_threads(1)
    cpu_platform.activate()
    gc.collect()
    left = live_tensor_bytes()
    training = build_training(case.config, vocab_size=VOCAB_SIZE)
    train_step(training, [batches(training) for _ in training.chunks])
    iterators = [batches(training) for _ in training.chunks]
    measured = peak_tensor_bytes(lambda: train_step(training, iterators))
    parallel_state.destroy_model_parallel()
    return measured - left


@pytest.mark.parametrize("name", ["fp32", "block recompute of 2", "pp2 interleaved"])
def test_layers_that_are_not_traced_are_like_those_that_are(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = BY_NAME[name]
    few = rank_memory(case.config, 0, case.world_size, vocab_size=VOCAB_SIZE, fused=False).peak.total
    depths: list[int] = []
    monkeypatch.setattr(memory, "repeat_unit", lambda config: depths.append(1))
    all_of_them = rank_memory(case.config, 0, case.world_size, vocab_size=VOCAB_SIZE, fused=False).peak.total
    assert depths, "the whole depth was traced"
    assert few == pytest.approx(all_of_them, rel=0.002)


def test_fusions_of_gpus_store_less() -> None:
    config = BY_NAME["bf16"].config
    fused, plain = (
        trace(config, 0, 1, vocab_size=VOCAB_SIZE, fused=fused).peak.total for fused in (True, False)
    )
    assert fused < 0.95 * plain


def test_purposes_add_up_and_are_known() -> None:
    found = trace(BY_NAME["cp2 lightseq"].config, 0, 2, vocab_size=VOCAB_SIZE, fused=False).peak
    assert sum(found.by_purpose.values()) == found.total
    assert set(found.by_purpose) <= set(PURPOSES)
    weights = found.by_purpose["weights"]
    assert found.by_purpose["gradients"] == pytest.approx(weights, rel=1e-3)
    assert found.by_purpose["optimizer"] == pytest.approx(2 * weights, rel=1e-3)
    assert found.by_purpose.get("other", 0) < 0.01 * found.total


def test_one_rank_of_1024_is_planned_without_the_others() -> None:
    config = with_values(
        BY_NAME["bf16"].config,
        tensor_model_parallel_size=2,
        context_parallel_size=4,
        cp_method="lightseq",
        global_batch_size=256,
        use_distributed_optimizer=True,
    )
    found = rank_memory(config, 1023, 1024, vocab_size=VOCAB_SIZE, fused=True).peak
    assert found.by_purpose["optimizer"] < found.by_purpose["weights"] / 10, "sharded over 512 ranks"
    assert not dist.is_initialized()


def test_the_world_is_as_before_after_a_failure() -> None:
    apply = torch.nn.Module._apply

    def fail() -> None:
        with fake_world(0, 2, fused=False, topk=2):
            raise RuntimeError(f"stop in a world of {dist.get_world_size()}")

    with pytest.raises(RuntimeError, match="stop in a world of 2"):
        fail()
    assert not dist.is_initialized()
    assert torch.nn.Module._apply is apply


def _by_caller(frame: FrameType) -> str:
    while frame.f_back is not None and not frame.f_code.co_name.startswith("make_"):
        frame = frame.f_back
    return frame.f_code.co_name.removeprefix("make_")


@pytest.mark.parametrize("fake", [False, True])
def test_ledger_counts_storages_until_they_are_freed(fake: bool) -> None:
    def make_small() -> torch.Tensor:
        return torch.empty(100)

    def make_large() -> torch.Tensor:
        return torch.empty(1000)

    ledger = Ledger(_by_caller)
    with FakeTensorMode() if fake else nullcontext(), ledger, ledger.resizing(), ledger.phase("all"):
        small, large = make_small(), make_large()
        view = large[:10]
        assert ledger.held == {"small": 400, "large": 4000}
        with ledger.phase("later"):
            del large
            assert ledger.held == {"small": 400, "large": 4000}, "the view keeps it alive"
            del view
            assert ledger.held == {"small": 400}
        ledger.adopt(small, "weights")
        assert ledger.held == {"weights": 400}
        small.untyped_storage().resize_(0)
        assert ledger.held == {}
    assert ledger.peaks["all"].total == 4400
    assert ledger.peaks["later"].by_purpose == {"small": 400, "large": 4000}
