"""What ranks are asked to measure, and their answers. Does not import torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from megatron_lightseq.config import PretrainConfig, from_flat, to_flat

VOCAB_SIZE = 256
"""Tokens are bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One system on some ranks."""

    system: str
    common: PretrainConfig
    """Model, data and steps, shared by all systems; each system changes it."""
    world_size: int
    warmup_steps: int = 1
    steps: int = 3
    threads: int = 1
    """Kernel threads per rank."""
    pin: bool = True
    """Bind rank r to core r modulo the number of cores."""
    profile_memory: bool = True
    """Run an additional, untimed step with torch's profiler."""
    measure_ceiling: bool = True
    """Measure the rate of matrix products first."""
    memory_budget_bytes: int | None = None
    """Private memory that a rank may use in addition to Python and its libraries; None for no limit."""

    def to_json(self) -> str:
        """Text for :meth:`from_json`."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return json.dumps({**fields, "common": to_flat(self.common)})

    @staticmethod
    def from_json(text: str) -> Job:
        """Read what :meth:`to_json` wrote."""
        fields = json.loads(text)
        flat = {
            key: tuple(value) if isinstance(value, list) else value for key, value in fields["common"].items()
        }
        return Job(**{**fields, "common": from_flat(flat)})


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMeasurement:
    """One optimizer step of one rank."""

    seconds: float
    cpu_seconds: float
    """CPU time of the rank's threads: the cost of a step on a machine that is also used by others."""
    loss: float
    bytes_sent: int
    """Through torch.distributed: attention's transfers, Megatron's collectives, and gradients."""
    attention_bytes_sent: int
    """The part of these that is sent by attention; 0 if attention does not communicate."""
    exposed_seconds: float | None
    """Wall clock time in communication calls and waits, when the host computes nothing; None on GPUs."""
    attention_forwards: int
    link_bytes_sent: int | None
    """Payload that left through the network interface of the ranks, as counted by the operating system."""
    warmup: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """The measurements of one rank."""

    steps: tuple[StepMeasurement, ...]
    peak_resident_bytes: int
    peak_tensor_bytes: int | None
    matmul_flops_per_second: float | None
    counts_forwards: bool
    """Whether ``attention_forwards`` is valid: Transformer Engine does not count them."""

    @staticmethod
    def from_dict(answer: dict[str, Any]) -> Measurement:
        """From the answer of a rank."""
        fields = dict(answer)
        steps = tuple(StepMeasurement(**step) for step in fields.pop("steps"))
        return Measurement(**fields, steps=steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class JobResult:
    """The measurements of all ranks, or why there are none."""

    system: str
    ranks: tuple[Measurement, ...] = ()
    refusal: str | None = None
    """Why the system cannot run on this machine."""
    failure: str | None = None
    """The end of the log, if it started and failed."""
    out_of_memory: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON."""
        return asdict(self)
