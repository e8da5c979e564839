"""The systems that are compared, each as changes to a configuration. Does not import torch.

Each system is set up in the best way its users would: Megatron with fused attention, with and without sequence
parallelism and recomputation, and with padded heads if tensor parallelism does not divide them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Literal

from megatron_lightseq.config import Machine, ModelConfig, PretrainConfig, violations, with_values
from megatron_lightseq.errors import ConfigError, UnsupportedError, explain
from megatron_lightseq.schedule import METHODS

Attention = Literal["lightseq", "sdpa", "transformer_engine"]
FULL_RECOMPUTE: Mapping[str, Any] = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
NO_RECOMPUTE: Mapping[str, Any] = {
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
}

SLICES: Mapping[str, Any] = {"mlp_tile_tokens": 512, "loss_tile_tokens": 512}
"""Slices of MLP and loss that are small enough for their activations to be negligible."""
NO_SLICES: Mapping[str, Any] = dict.fromkeys(SLICES)
"""Megatron as its users run it: slices are a feature of this package."""


@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    """One way to train the same model on the same ranks."""

    name: str
    title: str
    """Name in tables."""
    attention: Attention = "lightseq"
    """What computes attention: this package, torch's fused kernel, or Transformer Engine."""
    changes: Callable[[PretrainConfig, int], Mapping[str, Any]]
    """Maps the common configuration and the number of ranks to the keys that change."""
    min_ranks: int = 1
    """If greater than 1, the number of ranks must also be even."""

    def configure(self, common: PretrainConfig, world_size: int) -> PretrainConfig:
        """The configuration that this system runs on ``world_size`` ranks.

        Raises:
            UnsupportedError: It cannot run on them; the message says why.
        """
        if world_size < self.min_ranks or (self.min_ranks > 1 and world_size % 2):
            raise UnsupportedError(
                explain(
                    got=f"{self.name} on {world_size} rank(s)",
                    rule=f"it needs an even number of ranks, at least {self.min_ranks}",
                    remedy="Choose another number of ranks, or leave this system out",
                )
            )
        if self.attention == "transformer_engine" and find_spec("transformer_engine") is None:
            raise UnsupportedError(
                explain(
                    got=f"{self.name} without Transformer Engine",
                    rule="Megatron's own context parallelism is implemented in Transformer Engine",
                    remedy="Install transformer_engine on a machine with NVIDIA GPUs, or leave this system out",
                )
            )
        config = with_values(common, **self.changes(common, world_size))
        config = replace(config, model=padded_heads(config))
        # The data do not come from the configuration, so any data_path satisfies the rule that requires one.
        problems = violations(with_values(config, data_path=("text",)), Machine(world_size=world_size))
        if problems:
            raise UnsupportedError(f"{self.name} on {world_size} rank(s): {' '.join(problems)}")
        return config


def padded_heads(config: PretrainConfig) -> ModelConfig:
    """The model with its heads padded to a multiple of the tensor-parallel size; the added heads have no effect."""
    model, size = config.model, config.parallel.tensor_model_parallel_size
    if model.num_attention_heads % size == 0 and (
        model.query_groups % size == 0 or size % model.query_groups == 0
    ):
        return model
    share = model.num_attention_heads // model.query_groups
    groups = -(-model.query_groups // size) * size
    return replace(
        model,
        kv_channels=model.head_dim,
        num_query_groups=groups,
        num_attention_heads=groups * share,
    )


def _ours(method: str, **more: Any) -> Callable[[PretrainConfig, int], Mapping[str, Any]]:
    def changes(_: PretrainConfig, world_size: int) -> Mapping[str, Any]:
        layout = METHODS[method].default_layout
        return {"cp_method": method, "cp_layout": layout, "context_parallel_size": world_size, **more}

    return changes


def _megatron(tensor: Literal["all", "some", "none"]) -> Callable[[PretrainConfig, int], Mapping[str, Any]]:
    """Tensor parallelism over all ranks, over as many as the heads allow, or none; pipeline stages for the rest."""

    def changes(config: PretrainConfig, world_size: int) -> Mapping[str, Any]:
        sizes = {"all": world_size, "some": _tensor_size_with_pipeline(config, world_size), "none": 1}
        size = sizes[tensor]
        return {
            "cp_method": "megatron",
            "cp_layout": "auto",
            "cp_kernel": "auto",
            "context_parallel_size": 1,
            "tensor_model_parallel_size": size,
            "pipeline_model_parallel_size": world_size // size,
            **NO_SLICES,
        }

    return changes


def _tensor_size_with_pipeline(config: PretrainConfig, world_size: int) -> int:
    """The largest tensor-parallel size with at least two pipeline stages and no padding, or else half the ranks."""
    groups = config.model.query_groups
    sizes = [size for size in range(2, world_size // 2 + 1) if world_size % size == 0 and groups % size == 0]
    return max(sizes, default=world_size // 2)


def _sequence_parallel(
    tensor: Literal["all", "some", "none"],
) -> Callable[[PretrainConfig, int], Mapping[str, Any]]:
    plain = _megatron(tensor)

    def changes(config: PretrainConfig, world_size: int) -> Mapping[str, Any]:
        values = plain(config, world_size)
        return {**values, "sequence_parallel": values["tensor_model_parallel_size"] > 1}

    return changes


def _context_parallel(_: PretrainConfig, world_size: int) -> Mapping[str, Any]:
    return {
        "cp_method": "megatron",
        "cp_layout": "zigzag",
        "context_parallel_size": world_size,
        **NO_SLICES,
    }


def _with(
    changes: Callable[[PretrainConfig, int], Mapping[str, Any]], more: Mapping[str, Any]
) -> Callable[[PretrainConfig, int], Mapping[str, Any]]:
    return lambda config, world_size: {**changes(config, world_size), **more}


BASELINE = "megatron-tp-sp"
"""The default baseline for speed-ups."""

SYSTEMS: Mapping[str, System] = {
    system.name: system
    for system in (
        System(
            name=BASELINE,
            title="Megatron TP+SP",
            attention="sdpa",
            changes=_sequence_parallel("all"),
        ),
        System(
            name="megatron-tp-sp-stored",
            title="Megatron TP+SP, no recompute",
            attention="sdpa",
            changes=_with(_sequence_parallel("all"), NO_RECOMPUTE),
        ),
        System(name="megatron-tp", title="Megatron TP", attention="sdpa", changes=_megatron("all")),
        System(
            name="megatron-pp",
            title="Megatron PP",
            attention="sdpa",
            changes=_megatron("none"),
            min_ranks=2,
        ),
        System(
            name="megatron-tp-pp",
            title="Megatron TP+PP",
            attention="sdpa",
            changes=_sequence_parallel("some"),
            min_ranks=4,
        ),
        System(
            name="megatron-tp-pp-slices",
            title="Megatron TP+PP with our slices",
            attention="sdpa",
            changes=_with(_sequence_parallel("some"), SLICES),
            min_ranks=4,
        ),
        System(
            name="megatron-cp",
            title="Megatron CP (Transformer Engine)",
            attention="transformer_engine",
            changes=_context_parallel,
        ),
        *(System(name=method, title=method, changes=_ours(method)) for method in METHODS),
        System(
            name="lightseq-plain-recompute",
            title="lightseq, attention recomputed",
            changes=_ours("lightseq", keep_attention_on_recompute=False),
        ),
        System(
            name="lightseq-slices",
            title="lightseq, MLP and loss in slices",
            changes=_ours("lightseq", **SLICES),
        ),
        System(
            name="lightseq-no-overlap",
            title="lightseq, no overlap",
            changes=_ours("lightseq", cp_overlap=False),
        ),
    )
}
"""All systems by name."""


def choose(names: str, world_size: int) -> list[System]:
    """The systems of a comma-separated list; ``all`` selects the main ones that can run on ``world_size`` ranks.

    Raises:
        ConfigError: A name is unknown.
    """
    if names == "all":
        return [
            system
            for system in SYSTEMS.values()
            if system.min_ranks <= world_size
            and not system.name.startswith("lightseq-")
            and not system.name.endswith("-slices")
        ]
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in SYSTEMS]
    if unknown or not wanted:
        raise ConfigError(
            explain(
                got=f"--systems {names!r}",
                rule=f"the systems are {', '.join(SYSTEMS)}",
                remedy="Give names separated by commas, or all",
            )
        )
    return [SYSTEMS[name] for name in wanted]
