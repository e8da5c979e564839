"""Weights & Biases: the metrics of a run, where the `wandb` package is installed."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from megatron_lightseq.config import PretrainConfig
from megatron_lightseq.config.flat import to_flat
from megatron_lightseq.errors import ConfigError, explain


class WandbRun:
    """One run of a project, begun anew by every attempt.

    Args:
        config: of the run, all of which is uploaded; it names the project.

    Raises:
        ConfigError: there is no `wandb` package, or it cannot begin a run.
    """

    def __init__(self, config: PretrainConfig) -> None:
        logging = config.logging
        try:
            wandb = importlib.import_module("wandb")
            self._run: Any = wandb.init(
                project=logging.wandb_project,
                name=logging.wandb_exp_name,
                dir=logging.wandb_save_dir,
                config=to_flat(config),
            )
            # Steps may be repeated after a rollback, and wandb's own counter cannot go back.
            self._run.define_metric("*", step_metric="step")
        except (
            Exception
        ) as error:  # whatever the package raises: a login is missing, a host cannot be reached
            raise ConfigError(
                explain(
                    got=f"wandb_project {logging.wandb_project} ({type(error).__name__}: {error})",
                    rule="its metrics are logged with the wandb package",
                    remedy="pip install wandb and run `wandb login`, set WANDB_MODE=offline, or set wandb_project to "
                    "null",
                )
            ) from error

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of a step by tag; raises OSError if they cannot be logged."""
        try:
            self._run.log({**values, "step": step})
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Upload what is left; raises OSError if that fails."""
        try:
            self._run.finish()
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error
