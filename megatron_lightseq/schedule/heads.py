"""Which heads each rank computes after a group exchanges heads for tokens (DeepSpeed-Ulysses, arXiv 2309.14509)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

from megatron_lightseq.schedule.shape import TensorShape


@dataclass(frozen=True, slots=True)
class HeadCut:
    """Which heads each of ``size`` ranks computes."""

    num_heads: int
    """Query heads H."""
    num_groups: int
    """Key/value heads G; G divides H."""
    size: int
    """Ranks that exchange heads."""

    @staticmethod
    def of(shape: TensorShape, size: int) -> HeadCut:
        """The heads of ``shape`` over ``size`` ranks."""
        return HeadCut(shape.num_heads, shape.num_query_groups, size)

    def share_of(self, shape: TensorShape) -> TensorShape:
        """The shape that the rank with the most heads computes."""
        heads, groups = (max(map(len, ranges)) for ranges in (self.heads, self.groups))
        return replace(shape, num_heads=heads, num_query_groups=groups)

    @property
    def heads(self) -> tuple[range, ...]:
        """Query heads of each rank; their numbers differ by at most one, and are 0 for some ranks if H < size."""
        cuts = [self.num_heads * rank // self.size for rank in range(self.size + 1)]
        return tuple(range(a, b) for a, b in pairwise(cuts))

    @property
    def groups(self) -> tuple[range, ...]:
        """Key/value heads of each rank: those that its query heads read. Ranges of different ranks may overlap."""
        shared = self.num_heads // self.num_groups
        return tuple(
            range(heads.start // shared, heads[-1] // shared + 1) if heads else range(0)
            for heads in self.heads
        )

    @property
    def groups_are_disjoint(self) -> bool:
        """Whether every key/value head goes to one rank only."""
        return sum(map(len, self.groups)) == self.num_groups

    def group_of_head(self, rank: int) -> list[int] | None:
        """For each of a rank's query heads, which of the rank's key/value heads it reads. None if all key/value
        heads serve equally many query heads, so that a kernel finds them by division.
        """
        heads, groups = self.heads[rank], self.groups[rank]
        shared = self.num_heads // self.num_groups
        wanted = [head // shared - groups.start for head in heads]
        if groups and len(heads) % len(groups) == 0:
            per_group = len(heads) // len(groups)
            if wanted == [index // per_group for index in range(len(heads))]:
                return None
        return wanted
