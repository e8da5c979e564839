"""How a state reaches the ranks behind, and its gradient those before: the execution of a scan on one rank."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_lightseq.attention.runtime import Parcel
from megatron_lightseq.attention.trace import Marks
from megatron_lightseq.kernels.linear.contract import StateMap, act, compose
from megatron_lightseq.linear.plan import LinearPlan
from megatron_lightseq.schedule.ir import Direction, Fold, Item, Move, Payload, item_of


def follow(maps: StateMap, state: Tensor, direction: Direction) -> tuple[Tensor, Tensor]:
    """A state through pieces, one after another.

    Args:
        maps: (n, ...) of the pieces; in the backward direction with the gradients of their entering states in place
            of what they write.
        state: (B, H, K, V), which enters the first piece; or the gradient of the state behind the last one.
        direction: forward, or from the last piece to the first with transposed maps.

    Returns:
        (n, B, H, K, V), the states that reach each piece, and the one that leaves the other end.
    """
    backward = direction is Direction.BACKWARD
    order = range(len(maps.write) - 1, -1, -1) if backward else range(len(maps.write))
    reached: dict[int, Tensor] = {}
    for i in order:
        reached[i] = state
        state = act(maps.transition[i], state, maps.write[i], transposed=backward)
    return torch.stack([reached[i] for i in range(len(reached))]), state


def _composed(maps: StateMap, direction: Direction) -> StateMap:
    """The maps of n pieces as that of one."""
    backward = direction is Direction.BACKWARD
    order = range(len(maps.write) - 1, -1, -1) if backward else range(len(maps.write))
    total: StateMap | None = None
    for i in order:
        one = StateMap(maps.transition[i : i + 1], maps.write[i : i + 1])
        total = one if total is None else compose(total, one, transposed=backward)
    assert total is not None, "a shard has pieces"
    return total


class ScanSteps:
    """One execution of one scan: what the rank knows of which run of chunks."""

    def __init__(
        self,
        plan: LinearPlan,
        direction: Direction,
        own: Callable[[], StateMap],
        meanwhile: Callable[[], object] | None = None,
    ) -> None:
        """
        Args:
            plan: of this rank.
            direction: forward, or backward for the gradients of states.
            own: makes the maps of this rank's pieces, (n, ...); called only if the scan uses them.
            meanwhile: work that needs no state, done while the first ones travel.
        """
        self.direction = direction
        self.kind = f"{direction} scan"
        self._plan, self._scan, self._meanwhile = plan, plan.scans[direction], meanwhile
        self._maps: dict[Item, StateMap] = {}
        self._states: dict[Item, Tensor] = {}
        if self._scan.uses_own(plan.rank):
            maps = own()
            mine = Item(Payload.MAP, plan.rank)
            self._maps[mine] = maps if plan.invariant else _composed(maps, direction)
            self._states[Item(Payload.STATE, plan.rank)] = follow(self._maps[mine], plan.zero(), direction)[1]
        self._tags = [0]
        for step in self._scan.steps:
            self._tags.append(self._tags[-1] + len(step.moves))

    @property
    def result(self) -> Tensor:
        """The state that the rank's tokens need: zero, where a document begins with them."""
        needed = self._scan.needed.get(self._plan.rank)
        return self._plan.zero() if needed is None else self._states[needed]

    def __len__(self) -> int:
        return len(self._scan.steps)

    def outgoing(self, t: int) -> list[Parcel]:
        """As in :class:`~megatron_lightseq.attention.runtime.Steps`."""
        return [
            self._parcel(t, index, move, move.dst, self._bundle(item_of(move)))
            for index, move in enumerate(self._scan.steps[t].moves)
            if move.src == self._plan.rank
        ]

    def incoming(self, t: int) -> list[Parcel]:
        """As in :class:`~megatron_lightseq.attention.runtime.Steps`."""
        return [
            self._parcel(t, index, move, move.src, self._empty(item_of(move)))
            for index, move in enumerate(self._scan.steps[t].moves)
            if move.dst == self._plan.rank
        ]

    def compute(self, t: int, _marks: Marks) -> None:
        """The folds of a step; and once, as soon as the rank has to wait, what is to be done meanwhile."""
        step = self._scan.steps[t]
        for fold in step.folds[self._plan.rank]:
            self._fold(fold)
        if self._meanwhile is not None and any(move.dst == self._plan.rank for move in step.moves):
            self._meanwhile()
            self._meanwhile = None

    def take_in(self, t: int, outgoing: list[Parcel], incoming: list[Parcel]) -> None:
        """As in :class:`~megatron_lightseq.attention.runtime.Steps`."""
        arrived = (move for move in self._scan.steps[t].moves if move.dst == self._plan.rank)
        for move, parcel in zip(arrived, incoming, strict=True):
            if move.payload is Payload.STATE:
                (self._states[item_of(move)],) = parcel.bundle
            else:
                self._maps[item_of(move)] = StateMap(*parcel.bundle)

    def _fold(self, fold: Fold) -> None:
        earlier, later = fold
        if earlier.payload is Payload.STATE:
            self._states[fold.result] = follow(self._maps[later], self._states[earlier], self.direction)[1]
            return
        pair = self._maps[earlier], self._maps[later]
        if self._plan.invariant:
            ordered = pair if self.direction is Direction.FORWARD else pair[::-1]
            joined = StateMap(*(torch.cat(parts) for parts in zip(*ordered, strict=True)))
        else:
            joined = compose(*pair, transposed=self.direction is Direction.BACKWARD)
        self._maps[fold.result] = joined

    def _parcel(self, t: int, index: int, move: Move, peer: int, bundle: tuple[Tensor, ...]) -> Parcel:
        return Parcel(peer, self._tags[t] + index, f"{item_of(move)} of a scan", bundle)

    def _bundle(self, item: Item) -> tuple[Tensor, ...]:
        return (self._states[item],) if item.payload is Payload.STATE else self._maps[item]

    def _empty(self, item: Item) -> tuple[Tensor, ...]:
        state = self._plan.zero()
        if item.payload is Payload.STATE:
            return (state,)
        count = self._plan.maps_of(item.chunks)
        shape = (count, *state.shape[:2], *self._plan.inputs.transition)
        return state.new_empty(shape), state.new_empty(count, *state.shape)
