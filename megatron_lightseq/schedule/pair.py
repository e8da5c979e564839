"""Forward and backward of one kind of attention: their methods, and their schedules, each built once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from megatron_lightseq.schedule.build import solve
from megatron_lightseq.schedule.choose import Choice, rank_methods
from megatron_lightseq.schedule.ir import Direction
from megatron_lightseq.schedule.method import Method
from megatron_lightseq.schedule.methods import resolve_method
from megatron_lightseq.schedule.problem import Problem
from megatron_lightseq.schedule.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class SchedulePair:
    """A method for each direction of one problem, with the schedules that follow from them.

    Schedules are built when they are first read, and kept, so that everyone reads the same value.
    """

    problem: Problem
    """What is scheduled. Its direction is ignored."""
    forward_method: Method
    backward_method: Method

    @staticmethod
    def of(method: str | Method, problem: Problem) -> SchedulePair:
        """One method for both directions.

        Raises:
            UnsupportedError: an unknown method.
        """
        found = resolve_method(method)
        return SchedulePair(problem=problem, forward_method=found, backward_method=found)

    @staticmethod
    def from_choice(choice: Choice, problem: Problem) -> SchedulePair:
        """The two methods of a choice that ``auto`` made, on the problem's layout."""
        return SchedulePair(
            problem=problem,
            forward_method=resolve_method(choice.forward.method),
            backward_method=resolve_method(choice.backward.method),
        )

    @staticmethod
    def fastest(problem: Problem) -> SchedulePair:
        """For each direction, the method that is predicted to be the fastest on the problem's layout: ``auto``."""
        best, *_ = rank_methods(
            problem.layout.cp_size,
            problem.shape,
            problem.seq_length,
            mask=problem.mask,
            network=problem.network,
            layouts=[problem.layout.name],
            batch_rows=problem.layout.batch_rows,
        )
        return SchedulePair.from_choice(best, problem)

    def method(self, direction: Direction) -> Method:
        """The method of one direction."""
        return self.forward_method if direction is Direction.FORWARD else self.backward_method

    @property
    def name(self) -> str:
        """The method, or both methods if the directions differ."""
        return " + ".join(dict.fromkeys((self.forward_method.name, self.backward_method.name)))

    def schedule(self, direction: Direction) -> Schedule:
        """The schedule of one direction.

        Raises:
            UnsupportedError: the method does not work on the problem's layout.
            ScheduleError: the method's placement loses, repeats or misplaces a tile.
        """
        return self._forward if direction is Direction.FORWARD else self._backward

    @cached_property
    def _forward(self) -> Schedule:
        return self._solved(Direction.FORWARD)

    @cached_property
    def _backward(self) -> Schedule:
        return self._solved(Direction.BACKWARD)

    def _solved(self, direction: Direction) -> Schedule:
        method = self.method(direction)
        return solve(method, method.inner_problem(replace(self.problem, direction=direction)))

    def fitted(self, problem: Problem) -> SchedulePair:
        """The same methods for another problem, with the same schedules if they do not depend on what differs."""
        if self._sees(problem) == self._sees(self.problem):
            return self
        return replace(self, problem=problem)

    def _sees(self, problem: Problem) -> list[Problem]:
        """What the placements of both directions depend on."""
        return [self.method(way).inner_problem(replace(problem, direction=way)) for way in Direction]
