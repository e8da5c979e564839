"""The training loop with faults at exact places, for run_ranks: each function runs on every rank."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.training.launched import FLAGS

ALONE = {**FLAGS, "context_parallel_size": 1, "train_iters": 6, "progress": "off"}


@dataclass
class Ran:
    """What a run has left."""

    losses: dict[int, float] = field(default_factory=dict)
    """By step, of rank 0's metrics."""
    notes: list[str] = field(default_factory=list)
    error: str = ""
    reached: int = 0
    weights: str = ""
    """Hash of all weights at the end."""


def run_sick(
    corpus: str, overrides: dict[str, Any], fault: str = "", at: int = 0, attempt: int = 0, rank: int = 0
) -> Ran:
    """Train, with one of :data:`FAULTS` at a step, on one rank."""
    warnings.simplefilter("ignore")
    import torch
    import torch.distributed as dist
    import xxhash
    from megatron.core import parallel_state

    from megatron_lightseq.config import PretrainConfig, with_values
    from megatron_lightseq.errors import LightSeqError
    from megatron_lightseq.megatron.cpu import platform as cpu_platform
    from megatron_lightseq.training.data.datasets import open_corpora
    from megatron_lightseq.training.job.control_channel import ControlChannel
    from megatron_lightseq.training.job.join import Job
    from megatron_lightseq.training.job.launch import Launch
    from megatron_lightseq.training.job.signals import StopRequest
    from megatron_lightseq.training.loop import build_loop
    from megatron_lightseq.training.reporting.metrics import TrainMetrics, read_metrics
    from megatron_lightseq.training.reporting.progress import Progress

    cpu_platform.activate()
    own, size = dist.get_rank(), dist.get_world_size()
    config = with_values(PretrainConfig(), **{**ALONE, "data_path": (corpus,), **overrides})
    channel = ControlChannel(lambda: None, rank=0, world_size=1)  # type: ignore[arg-type, return-value]
    job = Job(
        launch=Launch(rank=own, world_size=size, local_world_size=size, attempt=attempt),
        channel=channel,
        device=torch.device("cpu"),
        backend="gloo",
        kernel="reference",
    )
    ran = Ran()
    note = Progress.note
    Progress.note = lambda _, text: ran.notes.append(text)  # type: ignore[method-assign]
    undo = FAULTS[fault](at) if fault and own == rank else lambda: None
    try:
        loop = build_loop(job, config, open_corpora(config), StopRequest())
        try:
            ran.reached = loop.run().position.iteration
        except LightSeqError as error:
            ran.error = f"{type(error).__name__}: {error}"
        hashed = xxhash.xxh3_64()
        for parameter in loop._training.models[0].parameters():
            hashed.update(parameter.detach().contiguous().view(torch.uint8).numpy())
        ran.weights = hashed.hexdigest()
    finally:
        undo()
        Progress.note = note  # type: ignore[method-assign]
        parallel_state.destroy_model_parallel()
    folder = config.logging.report_dir or config.checkpoint.save
    if folder is not None and own == 0:
        found = read_metrics(Path(folder) / "metrics.jsonl")
        ran.losses = {m.step: m.loss for m in found if isinstance(m, TrainMetrics)}
    return ran


def _gradients(spoil: Callable[[int, int], bool], change: Callable[[Any, Any], Any]) -> Callable[[], None]:
    """Calls ``change(training, measured)`` where ``spoil(step, number of the attempt at it)`` is true."""
    from megatron_lightseq.training.health import guard

    compute, step = guard.compute_gradients, guard.StepGuard.step
    now = {"step": 0, "attempt": 0}

    def counted(self: Any, number: int, *rest: Any) -> Any:
        now.update(step=number, attempt=0)
        return step(self, number, *rest)

    def spoiled(training: Any, batches: Any) -> Any:
        now["attempt"] += 1
        hit = spoil(now["step"], now["attempt"])
        handle = None
        if hit and change is nan_activations:
            handle = training.models[0].decoder.layers[1].register_forward_hook(change)
        try:
            measured = compute(training, batches)
        finally:
            if handle is not None:
                handle.remove()
        return change(training, measured) if hit and handle is None else measured

    guard.compute_gradients, guard.StepGuard.step = spoiled, counted

    def undo() -> None:
        guard.compute_gradients, guard.StepGuard.step = compute, step

    return undo


def nan_activations(_module: Any, _inputs: Any, output: Any) -> Any:
    """A forward hook."""
    hidden, *others = output if isinstance(output, tuple) else (output,)
    return (hidden * float("nan"), *others) if isinstance(output, tuple) else hidden * float("nan")


def raised(_training: Any, measured: Any) -> Any:
    return replace(measured, loss=measured.loss + 5.0)


def _before_save(at: int, change: Callable[[Any], None]) -> Callable[[], None]:
    from megatron_lightseq.training import saver

    save = saver.Saver.save

    def spoiled(self: Any, position: Any, *rest: Any, **settings: Any) -> Any:
        if position.iteration == at:
            change(next(iter(self._training.models[0].decoder.layers[0].mlp.linear_fc1.parameters())))
        return save(self, position, *rest, **settings)

    saver.Saver.save = spoiled  # type: ignore[method-assign]

    def undo() -> None:
        saver.Saver.save = save  # type: ignore[method-assign]

    return undo


def flip_exponent(parameter: Any) -> None:
    """The highest bit of an exponent: a small weight becomes 1e38 or so."""
    import torch

    parameter.data.view(-1)[0] = 0.5
    parameter.data.view(-1).view(torch.int32)[0] ^= 1 << 30
    assert bool(torch.isfinite(parameter.data).all())
    assert float(parameter.data.abs().max()) > 1e30


def fill_with_nan(parameter: Any) -> None:
    parameter.data.fill_(float("nan"))


def _flip_mantissa_after(at: int) -> Callable[[], None]:
    """The last bit of one weight of this rank's copy, after a step."""
    import torch

    from megatron_lightseq.training.health import guard

    step = guard.StepGuard.step

    def flipped(self: Any, number: int, *rest: Any) -> Any:
        result = step(self, number, *rest)
        if number == at:
            next(iter(self._training.models[0].decoder.parameters())).data.view(-1).view(torch.int32)[3] ^= 1
        return result

    guard.StepGuard.step = flipped  # type: ignore[method-assign]

    def undo() -> None:
        guard.StepGuard.step = step  # type: ignore[method-assign]

    return undo


def _other_batch(at: int, change: Callable[[Any], None]) -> Callable[[], None]:
    """This rank reads something else at a step."""
    from megatron_lightseq.training.health.batches import RecordedBatches

    following = RecordedBatches.__next__
    count = {"read": 0}

    def changed(self: Any) -> Any:
        batch = following(self)
        count["read"] += 1
        if count["read"] == at:
            change(batch)
        return batch

    RecordedBatches.__next__ = changed  # type: ignore[method-assign]

    def undo() -> None:
        RecordedBatches.__next__ = following  # type: ignore[method-assign]

    return undo


def other_token(batch: Any) -> None:
    batch["tokens"][0, -1] ^= 1


def other_rows(batch: Any) -> None:
    batch["origin"] += " and more"


FAULTS: dict[str, Callable[[int], Callable[[], None]]] = {
    "nan once": lambda at: _gradients(lambda step, attempt: step == at and attempt == 1, nan_activations),
    "nan": lambda at: _gradients(lambda step, _: step == at, nan_activations),
    "nan from": lambda at: _gradients(lambda step, _: step >= at, nan_activations),
    "spike": lambda at: _gradients(lambda step, _: step == at, raised),
    "flip before save": lambda at: _before_save(at, flip_exponent),
    "nan before save": lambda at: _before_save(at, fill_with_nan),
    "flip one copy": _flip_mantissa_after,
    "other token": lambda at: _other_batch(at, other_token),
    "other rows": lambda at: _other_batch(at, other_rows),
}
