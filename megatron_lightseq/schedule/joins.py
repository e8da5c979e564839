"""In which order partial results are joined where their bits must not depend on the number of ranks.

Sums of floating-point numbers depend on their order, so the order is fixed by the sequence alone: it is cut into a
*grid* of chunks, whatever the layout; the result of one query chunk against one key chunk is a *leaf*; and leaves are
joined along the aligned binary tree over the grid. A *node* ``[first, first + size)`` of the tree has a size that is a
power of two and a first leaf that is a multiple of it; its halves are joined left before right. Leaves without work do
not exist, and a node of which only one half exists is that half.

A rank joins what it computes into nodes, as far up as all leaves below are its own, and sends those; the owner joins
the rest. Which rank computes which leaf thus changes what travels, and not one bit of the result.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from megatron_lightseq.schedule.ir import Payload

T = TypeVar("T")


class Node(NamedTuple):
    """The leaves ``[first, first + size)``."""

    first: int
    size: int = 1

    @property
    def sibling(self) -> Node:
        """The node with which this one makes up the parent."""
        return Node(self.first ^ self.size, self.size)

    @property
    def parent(self) -> Node:
        """The node of which this one is a half."""
        return Node(self.first & ~self.size, 2 * self.size)


class Forest(Generic[T]):
    """Nodes of one tree, joined as far as they can be."""

    def __init__(self, leaves: Sequence[int], join: Callable[[T, T], T]) -> None:
        """A forest without nodes.

        Args:
            leaves: those that exist, in ascending order, whoever computes them.
            join: from the values of the left and the right half of a node to its own.
        """
        self._leaves = leaves
        self._join = join
        self._values: dict[Node, T] = {}

    def add(self, node: Node, value: T) -> None:
        """Add a node, and join it with its sibling for as long as that is there or does not exist."""
        while not self._is_whole(node):
            other = self._values.pop(node.sibling, None)
            if other is not None:
                value = (
                    self._join(value, other) if node.first < node.sibling.first else self._join(other, value)
                )
            elif self._exists(node.sibling):
                break
            node = node.parent
        self._values[node] = value

    def take(self) -> list[tuple[Node, T]]:
        """All nodes from left to right; the forest is then empty."""
        found = sorted(self._values.items(), key=lambda entry: entry[0])
        self._values = {}
        return found

    def _is_whole(self, node: Node) -> bool:
        return node.first <= self._leaves[0] and self._leaves[-1] < node.first + node.size

    def _exists(self, node: Node) -> bool:
        at = bisect_left(self._leaves, node.first)
        return at < len(self._leaves) and self._leaves[at] < node.first + node.size


def nodes_of(computed: Iterable[int], leaves: Sequence[int]) -> tuple[Node, ...]:
    """The nodes that one rank makes of the leaves it computes, from left to right.

    Args:
        computed: some of ``leaves``.
        leaves: all that exist, in ascending order.
    """
    forest: Forest[bool] = Forest(leaves, lambda left, right: left and right)
    for leaf in computed:
        forest.add(Node(leaf), True)
    return tuple(node for node, _ in forest.take())


@dataclass(frozen=True, slots=True)
class Joins:
    """What a rank's program says of the joins that it makes."""

    chunk: int
    """Tokens of a grid chunk, of which every call takes one of queries and one of keys."""
    leaves: Mapping[tuple[Payload, int], tuple[int, ...]]
    """For each result and grid chunk the leaves that exist, in ascending order."""
    carried: Mapping[int, tuple[tuple[int, Node], ...]]
    """For each transfer of results, by its tag, what it carries: grid chunks and nodes, in order."""
    own: tuple[tuple[int, int], ...]
    """The grid chunks of the rank's shard, each with its first token there."""
