"""Makes plans: from the inputs of a call to the runs of both directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from megatron_lightseq.attention.agreement import Agreement
from megatron_lightseq.attention.head_exchange import HeadExchange, HeadRun, UlyssesGroups
from megatron_lightseq.attention.inputs import Inputs, Masks
from megatron_lightseq.attention.plan import Plan, Run, TileRun
from megatron_lightseq.attention.ring_self_attention import RowRun
from megatron_lightseq.attention.runtime import BoundProgram, Runtime
from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.kernels.registry import Kernel
from megatron_lightseq.kernels.specs import REPEATING_KERNELS
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule import (
    Direction,
    Method,
    Network,
    Problem,
    Schedule,
    SchedulePair,
    compile_program,
)
from megatron_lightseq.schedule.grid import check_grid, on_grid
from megatron_lightseq.schedule.heads import HeadCut
from megatron_lightseq.transport import SubTransport


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """Plans attention of one kind over one group, for any inputs."""

    rank: int
    """This rank's number in the group."""
    layout: SequenceLayout
    methods: dict[Direction, Method] | None
    """The method of each direction; None for ``auto``, which predicts them from the inputs."""
    network: Network | None
    """What ``auto`` predicts with, and what placements may look at."""
    schedules: SchedulePair | None
    """Schedules that exist already; None: they are built for the inputs."""
    runtime: Runtime
    """Runs programs over the whole group."""
    agreement: Agreement
    chunk: int | None = None
    """Tokens of the grid that fixes the order of all sums (:mod:`schedule.joins`); None: the schedule's order."""
    softcap: float | None = None
    """Bound of the scores; the kernel has it already, methods without a kernel need it."""

    def plan(self, inputs: Inputs, mask: Masks, kernel: Kernel) -> tuple[Plan, Callable[[], None]]:
        """The plan for one kind of inputs and a mask, or one for each row.

        Every rank must plan for equal ones, but none waits for another here.

        Returns:
            The plan, and what to call before its first use: it raises :class:`TransportError` if ranks plan different
            things.

        Raises:
            LayoutError: the sequence does not divide among the ranks.
            UnsupportedError: the method does not work on the layout.
        """
        pair = self._pair(inputs, mask)
        if self.chunk is not None:
            _check_invariance(pair, inputs, kernel)
        sizes = [pair.method(direction).ulysses_size(self.layout.cp_size) for direction in Direction]
        plan = [str(pair.schedule(direction)) for direction in Direction]
        texts = [*plan, f"heads over {sizes}", kernel.name, inputs.describe(), f"joined by {self.chunk}"]
        settle = self.agreement.start("\n".join(texts), f"{shortened(shown(mask))} mask, {inputs.describe()}")
        forward, backward = (self._run(pair, direction, inputs, kernel) for direction in Direction)
        return Plan(forward, backward, self.runtime.stats), settle

    def _problem(self, inputs: Inputs, mask: Masks) -> Problem:
        """What is to be scheduled; of several masks, the rows of the batch as one sequence after the other."""
        layout, shape, seq_length = self.layout, inputs.shape, inputs.q_shape[0] * self.layout.cp_size
        self.layout.check_length(seq_length)
        if not isinstance(mask, Mask):
            rows = len(mask)
            layout, shape = layout.of_rows(rows), replace(shape, batch=1)
            mask, seq_length = Mask.of_rows(mask, seq_length), rows * seq_length
        return Problem(
            layout=layout,
            mask=mask,
            seq_length=seq_length,
            shape=shape,
            network=self.network,
            chunk=self.chunk,
        )

    def _pair(self, inputs: Inputs, mask: Masks) -> SchedulePair:
        """The schedules for these inputs: those that exist, or new ones of the given or of the fastest methods."""
        problem = self._problem(inputs, mask)
        if self.schedules is not None:
            return self.schedules.fitted(problem)
        if self.methods is None:
            return SchedulePair.fastest(problem)
        forward, backward = (self.methods[direction] for direction in Direction)
        return SchedulePair(problem=problem, forward_method=forward, backward_method=backward)

    def _run(self, pair: SchedulePair, direction: Direction, inputs: Inputs, kernel: Kernel) -> Run:
        """How this rank executes a schedule: as it is, between two exchanges of heads, or over full rows."""
        method, schedule = pair.method(direction), pair.schedule(direction)
        size = method.ulysses_size(self.layout.cp_size)
        if method.full_rows:
            # Scores are recomputed in the backward pass, as the forward pass of this method computes them.
            same = pair if pair.forward_method == method else SchedulePair.of(method, pair.problem)
            forward = same.schedule(Direction.FORWARD)
            forward_program, program = (self._bound(s, self.rank, inputs.device) for s in (forward, schedule))
            return RowRun(forward_program, program, self.runtime, self.softcap)
        if size == 1 or self.runtime.transport is None:
            return TileRun(self._bound(schedule, self.rank, inputs.device), kernel, self.runtime)
        return self._head_run(size, schedule, inputs, kernel)

    def _head_run(self, size: int, schedule: Schedule, inputs: Inputs, kernel: Kernel) -> HeadRun:
        """Heads exchanged among ``size`` ranks around the schedule of the ring between such groups."""
        whole = self.runtime.transport
        assert whole is not None, "a single rank exchanges no heads"
        groups = UlyssesGroups.of(self.layout, size, self.rank)
        cut = HeadCut.of(inputs.shape, size)
        exchange = HeadExchange(
            SubTransport(whole, groups.ulysses), groups.ulysses, self.layout, cut, self.runtime.stats
        )
        ring = Runtime(
            transport=SubTransport(whole, groups.ring) if len(groups.ring) > 1 else None,
            overlap=self.runtime.overlap,
            stats=self.runtime.stats,
            buffers=self.runtime.buffers,
            ranks=groups.ring,
        )
        program = self._bound(schedule, groups.ring.index(self.rank), inputs.device)
        return HeadRun(
            exchange, TileRun(program, kernel, ring, gradients_are_parts=not cut.groups_are_disjoint)
        )

    def _bound(self, schedule: Schedule, rank: int, device: torch.device) -> BoundProgram:
        program = compile_program(schedule, rank)
        if self.chunk is not None:
            program = on_grid(program, schedule, self.chunk)
        return BoundProgram.bind(program, device)


def _check_invariance(pair: SchedulePair, inputs: Inputs, kernel: Kernel) -> None:
    """Refuse what cannot give the same bits on every number of ranks.

    Raises:
        LayoutError: parts of shards are no whole chunks.
        UnsupportedError: the method or the kernel sums up in an order of its own.
    """
    for direction in Direction:
        method = pair.method(direction)
        check_grid(method.name, method.inner_problem(pair.problem))
        size = method.ulysses_size(pair.problem.layout.cp_size)
        if method.full_rows:
            reason = (
                f"method {method.name} holds full rows of scores, whose sums depend on the number of keys"
            )
        elif size > 1 and not HeadCut.of(inputs.shape, size).groups_are_disjoint:
            reason = (
                f"method {method.name} divides {inputs.shape.num_query_groups} key/value heads among {size} ranks, "
                "which add up the gradients of heads that they share"
            )
        elif kernel.name not in REPEATING_KERNELS:
            reason = f"kernel {kernel.name} is not known to repeat its results bit for bit"
        else:
            continue
        raise UnsupportedError(
            explain(
                got="results that must not depend on the number of ranks",
                rule=reason,
                remedy="Choose method lightseq, ring, zigzag or balanced, and a kernel among "
                f"{', '.join(REPEATING_KERNELS)}",
            )
        )


def shown(mask: Masks) -> str:
    """The text of a mask, or those of all rows."""
    return str(mask) if isinstance(mask, Mask) else " | row: ".join(map(str, mask))


def shortened(text: str) -> str:
    """The text, or its beginning where it is long: masks name the borders of all documents."""
    return text if len(text) <= 60 else f"{text[:57]}..."
