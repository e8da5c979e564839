"""The numbers of a run, step by step: a JSON line each, always, and TensorBoard files where asked for.

Tags: every key of a JSON line but ``step`` and ``kind`` is the TensorBoard tag ``<kind>/<key>``, with kind
``train`` or ``validation``; the x axis is the step.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

METRICS_NAME = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainMetrics:
    """One training step."""

    step: int
    """Counts from 1."""
    loss: float
    """Nats per token, mean over the global batch."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    tokens_per_second: float
    """Tokens of the global batch, over all ranks."""
    step_seconds: float
    tflops_per_rank: float
    """Arithmetic of the model (no recomputation) per second and rank, in 10^12."""
    memory_bytes: int
    """Peak of rank 0: resident memory on CPUs, allocated memory on GPUs."""
    exposed_communication: float
    """Fraction of the step in which rank 0's host waited for attention's transfers. On GPUs streams wait in its
    place, and this stays 0 whatever the overlap is."""
    consumed_samples: int
    skipped: bool
    """Whether the optimizer refused the step because gradients were not finite."""
    mtp_loss: float | None = None
    """With multi-token prediction: mean loss of the further tokens, nats per token, unweighted."""
    load_balancing_loss: float | None = None
    """Of experts that have one: before its coefficient, mean over layers, as Megatron-LM logs it; 1 is balance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationMetrics:
    """One evaluation."""

    step: int
    loss: float
    """Nats per token."""
    num_tokens: int


Metrics = TrainMetrics | ValidationMetrics
_KINDS: dict[type[Any], str] = {TrainMetrics: "train", ValidationMetrics: "validation"}


class MetricsLog:
    """Writes metrics; of one rank. A resumed run goes on behind the step that it resumed from."""

    def __init__(self, *, folder: Path | None, tensorboard: Path | None, resumed_step: int = 0) -> None:
        """Without ``folder`` nothing is written but TensorBoard's files, and those only if asked for."""
        self.path = None if folder is None else folder / METRICS_NAME
        self._stream = None
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _forget_after(self.path, resumed_step)
            self._stream = self.path.open("a", encoding="utf-8", buffering=1)
        self._writer: Any = None
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(tensorboard), purge_step=resumed_step + 1)

    def write(self, metrics: Metrics) -> None:
        """Append one step or evaluation."""
        kind = _KINDS[type(metrics)]
        values = asdict(metrics)
        if self._stream is not None:
            self._stream.write(json.dumps({"kind": kind, **values}) + "\n")
        if self._writer is not None:
            for key in values.keys() - {"step"}:
                if values[key] is not None:
                    self._writer.add_scalar(f"{kind}/{key}", values[key], metrics.step)

    def close(self) -> None:
        """Flush and close all files."""
        if self._stream is not None:
            self._stream.close()
        if self._writer is not None:
            self._writer.close()


def tags() -> list[str]:
    """Every TensorBoard tag, sorted."""
    return sorted(
        f"{kind}/{field.name}"
        for cls, kind in _KINDS.items()
        for field in fields(cls)
        if field.name != "step"
    )


def read_metrics(path: Path) -> list[Metrics]:
    """Every whole line of a metrics file; a last line that a killed run left half written is dropped."""
    found: list[Metrics] = []
    classes = {kind: cls for cls, kind in _KINDS.items()}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        found.append(classes[values.pop("kind")](**values))
    return found


def _forget_after(path: Path, step: int) -> None:
    """Drop steps that the run has not taken from its checkpoint's point of view."""
    if not path.exists():
        return
    kept = [metrics for metrics in read_metrics(path) if metrics.step <= step]
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"kind": _KINDS[type(m)], **asdict(m)}) + "\n" for m in kept)
    os.replace(temporary, path)
