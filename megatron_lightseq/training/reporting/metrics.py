"""The metrics of a run, step by step: one JSON line each, and TensorBoard files and a W&B run if asked for.

Every key of a JSON line except ``step``, ``kind`` and ``time`` is a TensorBoard tag ``<kind>/<key>``, with the kind
``train``, ``validation`` or ``save``; the x axis is the step. Lines of the kind ``attempt`` mark where a run has
started, or has gone back: the steps after the one that they name were repeated, or belong to an earlier run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_lightseq.training.reporting.wandb_run import WandbRun

logger = logging.getLogger(__name__)

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


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveMetrics:
    """One checkpoint."""

    step: int
    seconds: float
    """For which training waited."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """Ranks have started, or have gone back to an earlier checkpoint without a new start; steps after it do not count.

    Every start of a run writes one, so that the file tells what each attempt has done. Not in TensorBoard's files.
    """

    step: int
    """That training continues from; 0 from scratch."""
    restart: int
    """How often the launcher has restarted the ranks; 0 in a new command."""
    began: float | None
    """When the process of rank 0 started, in seconds since 1970; None if it has only gone back."""
    world_size: int
    host: str


Metrics = TrainMetrics | ValidationMetrics | SaveMetrics
_KINDS: dict[type[Any], str] = {
    TrainMetrics: "train",
    ValidationMetrics: "validation",
    SaveMetrics: "save",
    Attempt: "attempt",
}
_CLASSES = {kind: cls for cls, kind in _KINDS.items()}


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the file."""

    time: float
    """When it was written, in seconds since 1970; 0 if the line does not say."""
    value: Metrics | Attempt


class MetricsLog:
    """Writes the metrics of one rank, after those of earlier attempts. A file that cannot be written ends no run."""

    def __init__(
        self,
        *,
        folder: Path | None,
        tensorboard: Path | None,
        resumed_step: int = 0,
        wandb: WandbRun | None = None,
    ) -> None:
        """Without ``folder``, there are no JSON lines, only what ``tensorboard`` and ``wandb`` get."""
        self._wandb = wandb
        self.path = None if folder is None else folder / METRICS_NAME
        self._complained = False
        self._torn = True
        """Whether the file may end in the middle of a line: that of a killed attempt, or of a full disk."""
        self._writer: Any = None
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(tensorboard), purge_step=resumed_step + 1)

    def write(self, metrics: Metrics | Attempt) -> None:
        """Append one line."""
        values = asdict(metrics)
        self._append(json.dumps({"kind": _KINDS[type(metrics)], "time": round(time.time(), 3), **values}))
        if isinstance(metrics, Attempt):
            return
        kind = _KINDS[type(metrics)]
        numbers = {f"{kind}/{key}": x for key, x in values.items() if key != "step" and x is not None}
        if self._writer is not None:
            with self._tolerant("TensorBoard's files"):
                for tag, number in numbers.items():
                    self._writer.add_scalar(tag, number, metrics.step)
        if self._wandb is not None:
            with self._tolerant("Weights & Biases"):
                self._wandb.log(numbers, metrics.step)

    def _append(self, line: str) -> None:
        if self.path is None:
            return
        with self._tolerant(str(self.path)):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            start = "\n" if self._torn and _ends_within_a_line(self.path) else ""
            self._torn = True
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(f"{start}{line}\n")
            self._torn = False

    @contextmanager
    def _tolerant(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._complained:
                logger.warning("%s: %s: metrics are lost; training goes on", what, error.strerror or error)
            self._complained = True

    def close(self) -> None:
        """Flush and close all files."""
        if self._writer is not None:
            with self._tolerant("TensorBoard's files"):
                self._writer.close()
        if self._wandb is not None:
            with self._tolerant("Weights & Biases"):
                self._wandb.close()


def _ends_within_a_line(path: Path) -> bool:
    with path.open("ab+") as stream:
        if stream.tell() == 0:
            return False
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) != b"\n"


def tags() -> list[str]:
    """Every TensorBoard tag, sorted."""
    return sorted(
        f"{kind}/{field.name}"
        for cls, kind in _KINDS.items()
        if cls is not Attempt
        for field in fields(cls)
        if field.name != "step"
    )


def read_lines(path: Path) -> Iterator[Line]:
    """Every line of a metrics file that this package has written, in the order of writing.

    What a killed run or a bad disk has damaged is skipped; a file that cannot be read is empty.
    """
    try:
        with path.open(encoding="utf-8", errors="replace") as stream:
            for text in stream:
                with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    yield _parsed(json.loads(text))
    except OSError:
        return


def _parsed(values: dict[str, Any]) -> Line:
    """Raises an error of many kinds for anything that :class:`MetricsLog` has not written."""
    cls = _CLASSES[values.pop("kind")]
    when = float(values.pop("time", 0.0))
    found: Metrics | Attempt = cls(**values)
    for field in fields(cls):
        value, kind = getattr(found, field.name), str(field.type)
        kinds = (str,) if kind == "str" else (int,) if kind in ("int", "bool") else (int, float)
        if not isinstance(value, kinds) and not (value is None and "None" in kind):
            raise TypeError(field.name)
    return Line(when, found)


def read_metrics(path: Path) -> list[Metrics]:
    """The steps, evaluations and saves that count: those after which a later attempt has continued."""
    found: list[Metrics] = []
    for line in read_lines(path):
        if isinstance(line.value, Attempt):
            last = line.value.step
            found = [metrics for metrics in found if metrics.step <= last]
        else:
            found.append(line.value)
    return found
