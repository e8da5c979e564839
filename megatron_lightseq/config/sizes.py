"""How a world of ranks is divided into tensor, pipeline, context and data parallelism."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_lightseq.config.sections import PretrainConfig
from megatron_lightseq.errors import ConfigError, explain


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelSizes:
    """The sizes of the parallel groups.

    Raises:
        ConfigError: a size is below 1, or ``tensor * pipeline * context`` does not divide the world size.
    """

    world_size: int
    tensor: int = 1
    pipeline: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        sizes = {"tensor": self.tensor, "pipeline": self.pipeline, "context": self.context}
        product = math.prod(sizes.values())
        if min(self.world_size, *sizes.values()) < 1 or self.world_size % product:
            spelled = " * ".join(f"{name} {size}" for name, size in sizes.items())
            raise ConfigError(
                explain(
                    got=f"world size {self.world_size} with {spelled} = {product}",
                    rule="the world size must be a multiple of the product of the parallel sizes",
                    remedy=f"Start {max(1, self.world_size // max(1, product)) * product} ranks "
                    "(torchrun --nproc-per-node), or change a parallel size",
                )
            )

    @staticmethod
    def of(config: PretrainConfig, world_size: int) -> ParallelSizes:
        """The sizes that a configuration asks for, in a world of ``world_size`` ranks.

        Raises:
            ConfigError: the product of its sizes does not divide the world size.
        """
        parallel = config.parallel
        return ParallelSizes(
            world_size=world_size,
            tensor=parallel.tensor_model_parallel_size,
            pipeline=parallel.pipeline_model_parallel_size,
            context=parallel.context_parallel_size,
        )

    @property
    def data(self) -> int:
        """The data parallel size, which is what remains of the world."""
        return self.world_size // (self.tensor * self.pipeline * self.context)
