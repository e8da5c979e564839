"""One training step that is judged before it changes a weight.

A bad step is repeated on the same batch with the same random numbers. If the repetition is good, the fault was
transient (memory, a message), and the repetition is used. Otherwise the configuration says what happens.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_lightseq.errors import LightSeqError, explain
from megatron_lightseq.training.checkpoint.random_state import random_state, restore_random_state
from megatron_lightseq.training.health.batches import RecordedBatches, agree
from megatron_lightseq.training.health.judge import LossWindow, Verdict
from megatron_lightseq.training.health.witness import Witness
from megatron_lightseq.training.setup import Training
from megatron_lightseq.training.step import Batch, Measured, StepResult, compute_gradients, finish_step

WARN, STOP, SKIP, ROLLBACK = "warn", "stop", "skip", "rollback"


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """A bad step; the same on every rank."""

    action: str
    """:data:`WARN`: the step was taken. :data:`SKIP` and others: it was not."""
    text: str
    """What was seen."""

    def error(self) -> LightSeqError:
        """For a run that ends with it."""
        return LightSeqError(
            explain(
                got=self.text,
                rule="loss and gradients must be finite, and steady where on_loss_spike says so; the weights were not "
                "updated",
                remedy="Lower lr or raise lr_warmup_iters, or set on_nonfinite_step or on_loss_spike to skip or to "
                "rollback",
            )
        )


class StepGuard:
    """Trains step by step and judges each; every rank comes to the same judgement."""

    def __init__(self, training: Training, window: LossWindow | None = None) -> None:
        self._training = training
        self._settings = training.config.health
        self.window = window or LossWindow()
        """Judged against; of the good steps so far."""

    def step(self, step: int, iterators: Sequence[Iterator[Batch]]) -> tuple[StepResult, Fault | None]:
        """Train one step, unless it is bad. Collective.

        Raises:
            DataError: ranks that must share a batch have read different ones.
        """
        before = random_state()
        reads = [RecordedBatches(iterator) for iterator in iterators]
        measured = compute_gradients(self._training, reads)
        verdict = Verdict(agree(self._training, self._judge(measured), reads, step))
        if verdict == Verdict.GOOD:
            return self._take(measured), None
        again, seen = self._repeat(before, reads)
        if agree(self._training, self._judge(again), reads, step) == Verdict.GOOD:
            text = f"step {step}: {_shown(measured)}, and {_shown(again)} when it was repeated: a transient fault of "
            text += "the hardware; the repetition is used"
            return self._take(again), Fault(action=WARN, text=text)
        same = "the same" if _bits(measured) == _bits(again) else _shown(again)
        text = f"step {step}: {_shown(measured)}, and {same} when it was repeated"
        if verdict == Verdict.NOT_FINITE:
            text += f"; first not finite: {seen}"
        action = self._action(verdict)
        result = finish_step(self._training, again, update=action == WARN)
        return result, Fault(action=action, text=text)

    def _judge(self, measured: Measured) -> Verdict:
        if not measured.is_finite:
            return Verdict.NOT_FINITE
        watched = self._settings.on_loss_spike != "off"
        spike = watched and self.window.is_spike(measured.loss, self._settings.loss_spike_factor)
        return Verdict.SPIKE if spike else Verdict.GOOD

    def _action(self, verdict: Verdict) -> str:
        settings = self._settings
        return settings.on_nonfinite_step if verdict == Verdict.NOT_FINITE else settings.on_loss_spike

    def _take(self, measured: Measured) -> StepResult:
        self.window.add(measured.loss)
        return finish_step(self._training, measured, update=True)

    def _repeat(self, before: dict[str, Any], reads: Sequence[RecordedBatches]) -> tuple[Measured, str]:
        """The same step again, and what of it first was not finite, in words."""
        restore_random_state(before)
        witness = Witness()
        with witness.watching(self._training.models):
            measured = compute_gradients(self._training, [iter(read.kept) for read in reads])
        return measured, witness.everyones()


def _shown(measured: Measured) -> str:
    return f"loss {measured.loss:.6g}, grad norm {measured.grad_norm:.6g}"


def _bits(measured: Measured) -> bytes:
    return struct.pack("<dd", measured.loss, measured.grad_norm)
