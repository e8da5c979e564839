"""What a run checks while it trains, and what it does about a bad step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthConfig:
    """Bad steps, and copies of weights that have come apart."""

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
