"""What ranks are asked to measure, and what they answer. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from megatron_lightseq.config import PretrainConfig, from_flat, to_flat


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One system on some ranks."""

    system: str
    common: PretrainConfig
    """Model, data and steps that all systems share; the system changes it."""
    world_size: int
    warmup_steps: int = 1
    steps: int = 3
    threads: int = 1
    """Threads of a rank's kernels."""
    pin: bool = True
    """Bind rank r to core r modulo the cores."""
    profile_memory: bool = True
    """Run one more step, untimed, under torch's profiler."""
    measure_ceiling: bool = True
    memory_budget_bytes: int | None = None
    """Private memory that a rank may take beyond Python and its libraries; None: no limit."""

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
    """Processor time of the rank's threads: what a step costs a machine that is busy with other things, too."""
    loss: float
    bytes_sent: int
    """Through torch.distributed: attention's transfers, Megatron's collectives, gradients."""
    attention_bytes_sent: int
    """Of these, attention's transfers; 0 where attention does not communicate."""
    exposed_seconds: float | None
    """Wall clock in communication calls and waits, while the host computed nothing; None on GPUs."""
    attention_forwards: int
    link_bytes_sent: int | None
    """Payload that the kernel saw leave through the ranks' interface."""
    warmup: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What one rank measured."""

    steps: tuple[StepMeasurement, ...]
    peak_resident_bytes: int
    peak_tensor_bytes: int | None
    matmul_flops_per_second: float | None
    counts_forwards: bool
    """Whether ``attention_forwards`` means anything: Transformer Engine does not count."""

    @staticmethod
    def from_dict(answer: dict[str, Any]) -> Measurement:
        """From what a worker answered."""
        fields = dict(answer)
        steps = tuple(StepMeasurement(**step) for step in fields.pop("steps"))
        return Measurement(**fields, steps=steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A system's answer: every rank's measurement, or why there is none."""

    system: str
    ranks: tuple[Measurement, ...] = ()
    refusal: str | None = None
    """The system cannot run here at all, in words."""
    failure: str | None = None
    """It started and failed: the end of its log."""
    out_of_memory: bool = False

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
