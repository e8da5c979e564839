"""What this package needs from a process group. Groups are arguments: none is looked up in global state."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from megatron_lightseq.errors import ConfigError, explain


@runtime_checkable
class Group(Protocol):
    """The interface of a group, which torch's ProcessGroup and transport.LoopbackGroup implement."""

    def rank(self) -> int:
        """This rank's number in the group, from 0."""

    def size(self) -> int:
        """The number of ranks."""


def size_of(group: Group | None) -> int:
    """The number of ranks in a group; 1 for None.

    Raises:
        ConfigError: ``group`` is not a group.
    """
    if group is None:
        return 1
    if not isinstance(group, Group):
        raise ConfigError(
            explain(
                got=f"a group of type {type(group).__name__}",
                rule="a group is a torch.distributed.ProcessGroup or a transport.LoopbackGroup",
                remedy="Pass the group object itself, not ranks or a name",
            )
        )
    return group.size()


def rank_in(group: Group | None) -> int:
    """This rank's number in a group; 0 for None."""
    return 0 if group is None else group.rank()
