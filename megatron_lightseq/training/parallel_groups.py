"""The sizes and process groups of tensor (TP), pipeline (PP), data (DP) and context (CP) parallelism."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron_lightseq.errors import ConfigError, explain
from megatron_lightseq.transport.group import Group, size_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelSizes:
    """How a world of ranks is divided.

    Raises:
        ConfigError: a size is below 1, or ``tensor x pipeline x context`` does not divide the world.
    """

    world_size: int
    tensor: int = 1
    pipeline: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        sizes = {"tensor": self.tensor, "pipeline": self.pipeline, "context": self.context}
        product = math.prod(sizes.values())
        if min(self.world_size, *sizes.values()) < 1 or self.world_size % product:
            spelled = " x ".join(f"{name} {size}" for name, size in sizes.items())
            raise ConfigError(
                explain(
                    got=f"world size {self.world_size} with {spelled} = {product}",
                    rule="the world size is a multiple of the product of the model-parallel sizes",
                    remedy=f"Start {max(1, self.world_size // max(1, product)) * product} processes, "
                    "or change a parallel size",
                )
            )

    @property
    def data(self) -> int:
        """The data-parallel size that is left."""
        return self.world_size // (self.tensor * self.pipeline * self.context)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessGroups:
    """This rank's groups; None stands for a group of this rank alone."""

    tp: Group | None = None
    pp: Group | None = None
    dp: Group | None = None
    cp: Group | None = None

    @staticmethod
    def single() -> ProcessGroups:
        """One rank, no parallelism."""
        return ProcessGroups()

    @staticmethod
    def from_group(cp_group: Group | None) -> ProcessGroups:
        """Context parallelism alone, over a group of the caller's."""
        return ProcessGroups(cp=cp_group)

    @staticmethod
    def from_collection(collection: Any) -> ProcessGroups:
        """From Megatron's ``ProcessGroupCollection``; a group that it lacks is one of this rank alone.

        The collection answers None for any attribute it does not have, so None is what is tested for.
        """
        return ProcessGroups(**{name: getattr(collection, name, None) for name in ("tp", "pp", "dp", "cp")})

    def check(self, sizes: ParallelSizes) -> None:
        """Raise :class:`ConfigError` unless the groups have the sizes that were configured."""
        wanted = {"tp": sizes.tensor, "pp": sizes.pipeline, "dp": sizes.data, "cp": sizes.context}
        for name, size in wanted.items():
            actual = size_of(getattr(self, name))
            if actual != size:
                raise ConfigError(
                    explain(
                        got=f"a {name} group of {actual} ranks, configured {size}",
                        rule="groups are as large as the configuration says",
                        remedy="Initialise Megatron's model parallelism with the sizes of the configuration",
                    )
                )
