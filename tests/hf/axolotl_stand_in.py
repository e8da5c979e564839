"""What the plugin for Axolotl meets in Axolotl 0.19.0, for environments without it: its hooks, in its order."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import transformers


class BasePlugin:
    """The hooks of ``axolotl.integrations.base.BasePlugin`` that the plugin overrides do nothing there."""


class AxolotlTrainer(transformers.Trainer):
    """Its trainer does not give its models the number of targets, so that every micro-batch counts alike."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


class Config(dict[str, Any]):
    """Axolotl's configuration: missing keys are None, keys are attributes."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value


def install() -> None:
    """Put the stand-in in the place of the package."""
    base, trainers = ModuleType("axolotl.integrations.base"), ModuleType("axolotl.core.trainers.base")
    base.BasePlugin = BasePlugin  # type: ignore[attr-defined]
    trainers.AxolotlTrainer = AxolotlTrainer  # type: ignore[attr-defined]
    for name in ("axolotl", "axolotl.integrations", "axolotl.core", "axolotl.core.trainers"):
        sys.modules.setdefault(name, ModuleType(name))
    sys.modules[base.__name__], sys.modules[trainers.__name__] = base, trainers
