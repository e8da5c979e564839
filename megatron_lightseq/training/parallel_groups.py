"""The process groups of tensor (TP), pipeline (PP), data (DP) and context (CP) parallelism."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_lightseq.config.sizes import ParallelSizes
from megatron_lightseq.errors import ConfigError, explain
from megatron_lightseq.transport.group import Group, size_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessGroups:
    """This rank's groups; None is a group of this rank alone."""

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
        """Only context parallelism, over the caller's group."""
        return ProcessGroups(cp=cp_group)

    @staticmethod
    def from_collection(collection: Any) -> ProcessGroups:
        """From Megatron's ``ProcessGroupCollection``; a missing group is a group of this rank alone.

        The collection returns None for any attribute that it does not have, so ``hasattr`` would not tell.
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
                        rule="groups must have the sizes of the configuration",
                        remedy="Initialise Megatron's model parallelism with these sizes",
                    )
                )
