"""What a run checks while it trains, and what it does about a bad step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthConfig:
    """Bad steps, copies of weights that have come apart, and ranks that are slow or silent."""

    on_nonfinite_step: Literal["stop", "skip", "rollback"] = "stop"
    """If loss or gradients are not finite, twice: stop the run, skip the batch, or go back to the newest healthy
    checkpoint and skip the batches since."""
    on_loss_spike: Literal["off", "warn", "stop", "skip", "rollback"] = "warn"
    """The same for a loss far above those of the last 32 steps; warn: take the step and report it; off: do not look."""
    loss_spike_factor: float = 20.0
    """A spike is this many median absolute deviations, and 1 nat, above the median of the last 32 steps."""
    max_bad_steps: int = 5
    """Bad steps in a row that skip and rollback allow; after that the run stops."""
    check_weight_hash_across_dp_replicas_interval: int | None = None
    """Steps between comparisons of the hashes of weights that several ranks hold copies of; null: never."""
    straggler_factor: float | None = 2.0
    """A rank is reported as slow if it works this many times as long as the median of the others, in most of 16 steps;
    null: do not look."""
    rank_silence_seconds: float = 30.0
    """A rank whose process gives no sign of life for so long is given up, and the run ends."""
    step_timeout_seconds: float = 60.0
    """A step is considered hung after so many seconds, or after step_timeout_factor times the longest step so far,
    whichever is longer."""
    step_timeout_factor: float = 10.0
    """See step_timeout_seconds; distributed_timeout_minutes limits the first step, evaluating and saving."""
