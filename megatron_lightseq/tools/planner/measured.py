"""Measures the memory of small runs, and compares it with what is planned for them."""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megatron_lightseq.config import from_yaml, to_yaml
from megatron_lightseq.errors import LightSeqError
from megatron_lightseq.megatron.cpu import platform as cpu_platform
from megatron_lightseq.tools.memory import peak_tensor_bytes
from megatron_lightseq.tools.planner.cases import VOCAB_SIZE, Case
from megatron_lightseq.tools.planner.memory import rank_memory
from megatron_lightseq.tools.planner.trace import batches
from megatron_lightseq.tools.provenance import provenance
from megatron_lightseq.tools.ranks import Cluster, RankContext, run_task
from megatron_lightseq.training.setup import build_training
from megatron_lightseq.training.step import train_step


@dataclass(frozen=True, slots=True)
class Compared:
    """The peak of tensors of every rank of one run, in bytes."""

    name: str
    planned: tuple[int, ...]
    measured: tuple[int, ...]

    @property
    def error(self) -> float:
        """Relative error of the rank that holds most."""
        fullest = max(range(len(self.measured)), key=self.measured.__getitem__)
        return self.planned[fullest] / self.measured[fullest] - 1

    @property
    def worst_error(self) -> float:
        """The relative error of the rank with the largest one."""
        errors = [
            planned / measured - 1 for planned, measured in zip(self.planned, self.measured, strict=True)
        ]
        return max(errors, key=abs)


def peak_of_rank(request: str, context: RankContext) -> int:
    """The task for :func:`megatron_lightseq.tools.ranks.run_task`: peak bytes of tensors in the second step."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    cpu_platform.activate()
    context.join()
    training = build_training(from_yaml(request), vocab_size=VOCAB_SIZE)
    train_step(training, [batches(training) for _ in training.chunks])
    iterators = [batches(training) for _ in training.chunks]
    return peak_tensor_bytes(lambda: train_step(training, iterators))


def compare(cases: Iterable[Case], note: Callable[[str], Any]) -> list[Compared]:
    """Run and plan every case; ``note`` is told each result.

    Raises:
        LightSeqError: a run failed.
    """
    found = []
    for case in cases:
        answers = run_task(
            "megatron_lightseq.tools.planner.measured:peak_of_rank",
            to_yaml(case.config),
            case.world_size,
            Cluster(),
        )
        if answers.failure is not None:
            raise LightSeqError(f"{case.name}: {answers.failure}")
        found.append(Compared(case.name, plan(case), tuple(answers.by_rank)))
        note(f"{case.name}: {found[-1].error:+.1%} (worst rank {found[-1].worst_error:+.1%})")
    return found


def plan(case: Case) -> tuple[int, ...]:
    """What is planned for every rank of a run, in bytes."""
    return tuple(
        rank_memory(case.config, rank, case.world_size, vocab_size=VOCAB_SIZE, fused=False).peak.total
        for rank in range(case.world_size)
    )


def summary(compared: list[Compared]) -> dict[str, Any]:
    """The comparison as JSON: errors, and every run."""
    errors = [abs(each.worst_error) for each in compared]
    return {
        "what": "peak bytes of tensors of every rank in its second step: planned, and measured with torch's profiler",
        "where": provenance(),
        "runs": len(compared),
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
        "by_run": [
            {**asdict(each), "error": each.error, "worst_error": each.worst_error} for each in compared
        ],
    }


def to_json(compared: list[Compared]) -> str:
    """:func:`summary` as text."""
    return json.dumps(summary(compared), indent=1) + "\n"
