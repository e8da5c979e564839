"""Predicts how long every method takes on a described cluster, and chooses the fastest: ``method="auto"``.

A prediction simulates the schedule that would run (simulate.py), with the exchanges of heads before and after it if
the method has them. Forward and backward transfer different tensors, so each direction may have its own method.
Both read the same shards, so they share one layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule.build import steps_of
from megatron_lightseq.schedule.heads import HeadCut
from megatron_lightseq.schedule.ir import Direction
from megatron_lightseq.schedule.method import Method
from megatron_lightseq.schedule.methods import (
    METHODS,
    SMALL_GROUP,
    default_layouts,
    layouts_worth_comparing,
    resolve_method,
)
from megatron_lightseq.schedule.network import Device, Network, transfer_times
from megatron_lightseq.schedule.problem import Problem
from megatron_lightseq.schedule.shape import TensorShape
from megatron_lightseq.schedule.simulate import Costs, Profile, simulate

Message = tuple[int, int, int]  # source, destination, bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The predicted cost of one direction of attention with one method."""

    method: str
    layout: str
    direction: Direction
    seconds: float
    """From the first rank's start to the last rank's end."""
    compute_s: float
    """Kernel time of the busiest rank."""
    bytes_received: int
    """By the busiest rank."""
    exposed_s: float
    """The longest that any rank waits for transfers that its kernels do not overlap."""

    @property
    def waiting_s(self) -> float:
        """Time in which the busiest rank runs no kernels: transfers that nothing overlaps, and idle time."""
        return self.seconds - self.compute_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A layout with a method for each direction."""

    forward: Prediction
    backward: Prediction

    @property
    def layout(self) -> str:
        """The layout of both directions."""
        return self.forward.layout

    @property
    def seconds(self) -> float:
        """Forward and backward together."""
        return self.forward.seconds + self.backward.seconds

    @property
    def bytes_received(self) -> int:
        """By the busiest rank, forward and backward together."""
        return self.forward.bytes_received + self.backward.bytes_received

    @property
    def waiting_s(self) -> float:
        """Time outside kernels, forward and backward together."""
        return self.forward.waiting_s + self.backward.waiting_s

    @property
    def name(self) -> str:
        """The method, or both methods if they differ."""
        names = dict.fromkeys((self.forward.method, self.backward.method))
        return " + ".join(names)

    def __str__(self) -> str:
        return (
            f"{self.name:<24} {self.layout:<10} {self.seconds * 1e3:10.3f} ms, "
            f"of which {self.waiting_s * 1e3:10.3f} ms waiting; "
            f"busiest rank receives {self.bytes_received / 2**20:10,.1f} MiB"
        )


@dataclass(slots=True)
class Chooser:
    """Predictions for one sequence over P ranks. Keeps the profiles of schedules, so that predictions for another
    network or shape cost little.
    """

    cp_size: int
    seq_length: int
    mask: Mask = field(default_factory=Mask.causal)
    device: Device = field(default_factory=Device)
    overlap: bool = True
    """Whether transfers run concurrently with kernels. An exchange of heads never does."""
    batch_rows: int = 1
    """Rows with masks of their own, which ``mask`` and ``seq_length`` are of, one after the other."""
    _profiles: dict[tuple[Method, Problem], Profile] = field(default_factory=dict)

    def predict(
        self,
        method: str | Method,
        layout_name: str,
        direction: Direction,
        shape: TensorShape,
        network: Network,
    ) -> Prediction:
        """How long ``method`` takes on shards cut by ``layout_name``.

        Raises:
            UnsupportedError: the method does not work on that layout.
        """
        found = resolve_method(method)
        problem = self._problem(layout_name, direction, shape, network)
        cut = HeadCut.of(shape, found.ulysses_size(self.cp_size))
        share = cut.share_of(shape)
        played = simulate(
            self._profile(found, problem),
            Costs(
                seconds_per_pair=seconds_per_pair(share, direction, self.device),
                network=network.of_one_ring(cut.size),
                overlap=self.overlap,
            ),
            share,
        )
        there, back = exchange_messages(problem, cut)
        ready = [0.0] * self.cp_size
        around_s = sum(max(transfer_times(messages, ready, network)) for messages in (there, back))
        received = [0] * self.cp_size
        for _, dst, num_bytes in (*there, *back):
            received[dst] += num_bytes
        return Prediction(
            method=found.name,
            layout=layout_name,
            direction=direction,
            seconds=played.makespan_s + around_s,
            compute_s=max(played.compute_s),
            bytes_received=max(received) + max(played.bytes_received),
            exposed_s=played.exposed_s + around_s,
        )

    def _problem(
        self, layout_name: str, direction: Direction, shape: TensorShape, network: Network
    ) -> Problem:
        return Problem(
            layout=SequenceLayout(layout_name, self.cp_size).of_rows(self.batch_rows),
            mask=self.mask,
            seq_length=self.seq_length,
            direction=direction,
            shape=shape,
            network=network,
        )

    def _profile(self, method: Method, problem: Problem) -> Profile:
        inner = method.inner_problem(problem)
        if (method, inner) not in self._profiles:
            # Checking every candidate would take half of the time; the one that is chosen is checked when it is built.
            self._profiles[method, inner] = Profile.of_steps(
                steps_of(method, inner),
                inner.layout.cp_size,
                inner.seq_length / inner.layout.cp_size,
                inner.areas,
            )
        return self._profiles[method, inner]

    def rank(
        self, shape: TensorShape, network: Network, layouts: Sequence[str] | None = None
    ) -> list[Choice]:
        """Every method on every one of ``layouts`` (default: :func:`layouts_worth_comparing`), best first; and for each
        layout the best pair of methods.
        """
        choices: list[Choice] = []
        compared = layouts_worth_comparing(self.cp_size, network) if layouts is None else layouts
        for layout in compared:
            if not SequenceLayout(layout, self.cp_size).of_rows(self.batch_rows).divides(self.seq_length):
                continue
            forward, backward = (
                self._predict_all(layout, direction, shape, network) for direction in Direction
            )
            choices += [
                Choice(forward=f, backward=b) for f in forward for b in backward if f.method == b.method
            ]
            best = Choice(forward=min(forward, key=_preference), backward=min(backward, key=_preference))
            if best.forward.method != best.backward.method:
                choices.append(best)
        return sorted(choices, key=_preference)

    def _predict_all(
        self, layout: str, direction: Direction, shape: TensorShape, network: Network
    ) -> list[Prediction]:
        """Predictions of all candidates, starting with those that place tiles on few ranks. A schedule over
        hundreds of ranks takes seconds to build: beyond SMALL_GROUP ranks, stop at a candidate that is as fast as
        its kernels.
        """
        names = candidates(self._problem(layout, direction, shape, network))
        names.sort(key=lambda name: -resolve_method(name).ulysses_size(self.cp_size))
        whole = range(self.seq_length)
        pair_s = seconds_per_pair(shape, direction, self.device)
        ideal_s = self.mask.area(whole, whole) * pair_s / self.cp_size
        predictions: list[Prediction] = []
        for name in names:
            predictions.append(self.predict(name, layout, direction, shape, network))
            if self.cp_size > SMALL_GROUP and predictions[-1].seconds <= 1.002 * ideal_s:
                break
        return predictions


def _preference(thing: Prediction | Choice) -> tuple[float, int]:
    """Sorts by time; and by bytes where times are equal to three digits, which is as far as the model can be
    trusted."""
    return float(f"{thing.seconds:.3g}"), thing.bytes_received


def candidates(problem: Problem) -> list[str]:
    """The names of the methods that are worth simulating, in the order of ``METHODS``.

    Each method says under which names (:attr:`Method.auto_candidates`). Those that another candidate always equals or
    beats are left out.
    """
    return [name for method in METHODS.values() for name in method.candidates(problem)]


def exchange_messages(problem: Problem, cut: HeadCut) -> tuple[list[Message], list[Message]]:
    """The messages that exchange heads for tokens, and those that exchange them back."""
    layout, shape = problem.layout.of_rows(1), problem.shape
    tokens = problem.seq_length // layout.cp_size * shape.batch
    dims, e = shape.head_dim + shape.value_dim, shape.element_bytes
    if problem.direction is Direction.FORWARD:
        head_there, head_back = shape.head_dim * e, shape.value_dim * e + 4
        group_back = 0
    else:
        head_there, head_back = dims * e + 8, shape.head_dim * e
        group_back = dims * (e if cut.groups_are_disjoint else 4)
    there: list[Message] = []
    back: list[Message] = []
    for group in range(layout.cp_size // cut.size):
        members = layout.members(group, cut.size)
        for index, owner in enumerate(members):
            heads, groups = len(cut.heads[index]), len(cut.groups[index])
            for other in members:
                if other != owner:
                    there.append((other, owner, tokens * (heads * head_there + groups * dims * e)))
                    back.append((owner, other, tokens * (heads * head_back + groups * group_back)))
    return there, back


def seconds_per_pair(shape: TensorShape, direction: Direction, device: Device) -> float:
    """Kernel time per allowed pair: two matrix products forward, five backward, 2 operations per multiply-add."""
    if direction is Direction.FORWARD:
        flops, rate = 2 * (shape.head_dim + shape.value_dim), device.forward_flops_per_s
    else:
        flops, rate = 2 * (3 * shape.head_dim + 2 * shape.value_dim), device.backward_flops_per_s
    return shape.batch * shape.num_heads * flops / rate


def rank_methods(
    cp_size: int,
    shape: TensorShape,
    seq_length: int,
    *,
    mask: Mask | None = None,
    network: Network | None = None,
    device: Device | None = None,
    layouts: Sequence[str] | None = None,
    batch_rows: int = 1,
) -> list[Choice]:
    """All methods, and the best pair of methods, with their predicted times; fastest first.

    Args:
        cp_size: context-parallel ranks P.
        shape: heads, dims and dtype of the attention inputs.
        seq_length: tokens over all ranks.
        mask: default causal.
        network: default NVLink within nodes of 8 and 100 Gbps between them.
        device: default an H100.
        layouts: those to consider; default: :func:`layouts_worth_comparing`. If the sequence is
            already cut, give its layout alone.
        batch_rows: rows with masks of their own, which ``mask`` and ``seq_length`` are of, one after the other.

    Raises:
        LayoutError: no layout cuts ``seq_length`` over ``cp_size`` ranks.
    """
    chooser = Chooser(cp_size, seq_length, mask or Mask.causal(), device or Device(), batch_rows=batch_rows)
    choices = chooser.rank(shape, network or Network.parse("nvlink+100gbps"), layouts)
    if not choices:
        SequenceLayout((layouts or default_layouts())[0], cp_size).of_rows(batch_rows).check_length(
            seq_length
        )
    return choices


def reason(choices: Sequence[Choice]) -> str:
    """Why the first of ``choices`` was chosen, in one or two sentences."""
    best, *others = choices
    text = (
        f"{best.name} on the {best.layout} layout: {best.seconds * 1e3:.3f} ms predicted, of which "
        f"{best.forward.compute_s * 1e3 + best.backward.compute_s * 1e3:.3f} ms in kernels"
    )
    single = next((other for other in others if " + " not in other.name), None)
    if single is None:
        return f"{text}."
    slower = single.seconds / best.seconds - 1
    return (
        f"{text}. Next best: {single.name} on {single.layout}, {slower:.1%} slower ({single.waiting_s * 1e3:.3f} ms "
        f"outside kernels; its busiest rank receives {single.bytes_received / 2**20:,.1f} MiB, "
        f"{best.name}'s {best.bytes_received / 2**20:,.1f} MiB)."
    )
