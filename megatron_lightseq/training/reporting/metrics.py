"""The metrics of a run, step by step: one JSON line each, and TensorBoard files if asked for.

Every key of a JSON line except ``step`` and ``kind`` is a TensorBoard tag ``<kind>/<key>``, with the kind ``train`` or
``validation``; the x axis is the step.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TextIO

METRICS_NAME = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainMetrics:
    """One training step."""

    step: int
    """Counts from 1."""
    loss: float
    """In nats per token, averaged over the global batch."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float
    tokens_per_second: float
    """Over all ranks."""
    step_seconds: float
    tflops_per_rank: float
    """Floating-point operations of the model, without recomputation, per second and rank, in 10^12."""
    memory_bytes: int
    """Peak on rank 0: resident memory on CPUs, memory allocated by torch on GPUs."""
    exposed_communication: float
    """Fraction of the step that rank 0's host waited for attention's transfers. On GPUs, streams wait instead of the
    host, and this is always 0."""
    consumed_samples: int
    skipped: bool
    """Whether the weights were left as they were, because loss or gradients were bad."""
    mtp_loss: float | None = None
    """With multi-token prediction: its mean loss in nats per token, before its weight."""
    load_balancing_loss: float | None = None
    """With a load balancing loss: its mean over layers before its coefficient, as Megatron-LM logs it; 1 is balance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationMetrics:
    """One evaluation."""

    step: int
    loss: float
    """In nats per token."""
    num_tokens: int


Metrics = TrainMetrics | ValidationMetrics
_KINDS: dict[type[Any], str] = {TrainMetrics: "train", ValidationMetrics: "validation"}


class MetricsLog:
    """Writes the metrics of one rank. A resumed run continues after the step that it resumed from."""

    def __init__(self, *, folder: Path | None, tensorboard: Path | None, resumed_step: int = 0) -> None:
        """Without ``folder``, only TensorBoard's files are written, if ``tensorboard`` is given."""
        self.path = None if folder is None else folder / METRICS_NAME
        self._stream: TextIO | None = None
        self.rewind(resumed_step)
        self._writer: Any = None
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(tensorboard), purge_step=resumed_step + 1)

    def rewind(self, step: int) -> None:
        """Forget what was written after a step; the run has gone back to it."""
        if self.path is None:
            return
        if self._stream is not None:
            self._stream.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _forget_after(self.path, step)
        self._stream = self.path.open("a", encoding="utf-8", buffering=1)

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
    """Every complete line of a metrics file; an incomplete last line of a killed run is skipped."""
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
    """Drop the steps after the checkpoint that the run resumes from."""
    if not path.exists():
        return
    kept = [metrics for metrics in read_metrics(path) if metrics.step <= step]
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"kind": _KINDS[type(m)], **asdict(m)}) + "\n" for m in kept)
    os.replace(temporary, path)
