"""Rules on what a run does about bad steps."""

from __future__ import annotations

from megatron_lightseq.config.rules import Machine, RuleSet
from megatron_lightseq.config.sections import PretrainConfig

HEALTH = RuleSet()


@HEALTH.rule(
    "on_nonfinite_step",
    "on_loss_spike",
    "save",
    "save_interval",
    remedy="Set save and save_interval, or skip instead of rollback",
)
def rollback_needs_checkpoints(c: PretrainConfig, _: Machine) -> bool:
    """rollback returns to a checkpoint that this run has saved on its way."""
    rolls_back = "rollback" in (c.health.on_nonfinite_step, c.health.on_loss_spike)
    return not rolls_back or (c.checkpoint.save is not None and c.checkpoint.save_interval is not None)
