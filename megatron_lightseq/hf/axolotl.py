"""Axolotl with its sequences cut over ranks, by one plugin in the YAML file::

    plugins:
      - megatron_lightseq.hf.axolotl.LightSeqPlugin
    lightseq_context_parallel_size: 2

Axolotl's own ``context_parallel_size`` stays out of the file: it demands flash attention, and cuts the labels so that
the targets at the borders of shards are lost.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, Field

from megatron_lightseq.errors import ConfigError, UnsupportedError, explain
from megatron_lightseq.hf.attention import register
from megatron_lightseq.hf.supported import IMPLEMENTATION, unwrapped
from megatron_lightseq.hf.trainer import LightSeqTrainerMixin, ParallelismConfig

_ONCE = "sequences are cut once, by this plugin"


class LightSeqArgs(BaseModel):
    """The keys of the YAML file."""

    lightseq_context_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share every sequence."""
    lightseq_cp_method: str = "lightseq"
    """As ``--cp-method`` of ``lightseq pretrain``."""


class LightSeqPlugin(BasePlugin):
    """Trains supervised fine-tuning and pretraining with :class:`LightSeqTrainerMixin`."""

    def get_input_args(self) -> str:
        """Where Axolotl finds the keys."""
        return f"{LightSeqArgs.__module__}.{LightSeqArgs.__name__}"

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """Leave the data to Axolotl, and the model where there is no GPU, on which Axolotl puts that of every rank."""
        if _cuts(cfg) and not torch.accelerator.is_available():
            cfg.device_map = None

    def pre_model_load(self, cfg: Any) -> None:
        """Refuse what would be silently wrong beside this plugin, before anything is loaded."""
        if not _cuts(cfg):
            return
        for key, why in _REFUSED.items():
            if cfg.get(key) not in (None, False, 1, 0):
                raise UnsupportedError(
                    explain(
                        got=f"{key}: {cfg.get(key)} with lightseq_context_parallel_size: {_size(cfg)}",
                        rule=why,
                        remedy=f"Take {key} out of the file",
                    )
                )
        _replicas(cfg)
        register()

    def post_model_load(self, cfg: Any, model: Any) -> None:
        """The schema of ``attn_implementation`` has a fixed list of names, so that it is set here."""
        if _cuts(cfg):
            unwrapped(model).set_attn_implementation(IMPLEMENTATION)

    def get_trainer_cls(self, cfg: Any) -> type | None:
        """Axolotl's trainer with sequences that are cut."""
        if not _cuts(cfg):
            return None
        from axolotl.core.trainers.base import AxolotlTrainer

        options = {"method": cfg.get("lightseq_cp_method") or "lightseq"}
        bases = (LightSeqTrainerMixin, AxolotlTrainer)
        return type("LightSeqAxolotlTrainer", bases, {"context_parallel_options": options})

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        """The mesh of ranks."""
        if not _cuts(cfg):
            return {}
        replicas = "dp_shard_size" if cfg.get("fsdp_config") else "dp_replicate_size"
        sizes = {"cp_size": _size(cfg), replicas: _replicas(cfg)}
        return {"parallelism_config": ParallelismConfig(**sizes)}


_REFUSED = {
    "context_parallel_size": _ONCE,
    "sequence_parallel_degree": _ONCE,
    "tensor_parallel_size": "context parallelism has been tried with data parallelism only",
    "rl": "trainers of preferences and rewards have losses of their own",
    "reward_model": "trainers of preferences and rewards have losses of their own",
    "process_reward_model": "trainers of preferences and rewards have losses of their own",
    "deepspeed": "its engine averages gradients over groups of its own",
}


def _size(cfg: Any) -> int:
    return int(cfg.get("lightseq_context_parallel_size") or 1)


def _cuts(cfg: Any) -> bool:
    return _size(cfg) > 1


def _replicas(cfg: Any) -> int:
    """Groups that hold batches of their own."""
    size, processes = _size(cfg), int(os.environ.get("WORLD_SIZE", 1))
    if processes % size:
        raise ConfigError(
            explain(
                got=f"lightseq_context_parallel_size: {size} with {processes} processes",
                rule="it divides the number of processes",
                remedy="Launch a multiple of it, as with `axolotl train FILE --launcher torchrun -- --nproc-per-node "
                f"{size}`",
            )
        )
    return processes // size
