"""What a context-parallel method is, with everything that is known about it in one place."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import lcm

from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.layout import LAYOUTS, SequenceLayout
from megatron_lightseq.schedule.heads import HeadCut
from megatron_lightseq.schedule.ir import Placement
from megatron_lightseq.schedule.problem import Problem
from megatron_lightseq.schedule.shape import TensorShape

NOMINAL_CHUNK_LENGTH = 1024
"""Assumed tokens per chunk when a schedule is built without a sequence length."""

Candidates = Callable[[Problem], Sequence[str]]
"""From a problem, its shape and network included, to the names under which ``auto`` considers a method for it."""


def no_exchange(cp_size: int) -> int:
    """The Ulysses size of methods that exchange no heads."""
    del cp_size
    return 1


@dataclass(frozen=True, slots=True)
class SizedForm:
    """The form of a method's name that carries sizes, such as ``mesh:4x2``."""

    text: str
    """What follows the colon, with a word in capitals for each size: ``ROWSxCOLUMNS``."""
    make: Callable[..., Method]
    """From the sizes, positive integers, to the method."""

    def parse(self, text: str) -> Method | None:
        """The method for the text after the colon, or None if the text does not have this form."""
        match = re.fullmatch(re.sub(r"[A-Z]+", r"([1-9]\\d*)", self.text), text)
        return self.make(*map(int, match.groups())) if match else None


@dataclass(frozen=True, slots=True)
class Method:
    """A way to share attention among ranks: a placement, and the facts that follow from its mathematics.

    Pass one as ``method=`` wherever a name is accepted, or add it to ``METHODS`` to make its name known everywhere.
    """

    name: str
    place: Callable[[Problem], Placement]
    """Which rank computes which tile at which step. Tiles that the mask leaves empty may be named: they are
    dropped."""
    summary: str = ""
    """What a rank computes, in one line."""
    source: str = ""
    """The paper or system that the method comes from."""
    default_layout: str = "contiguous"
    """The layout it is used on unless another one is asked for."""
    only_layouts: tuple[str, ...] = ()
    """The only layouts it can compute on; empty if it can compute on any."""
    splits: int | Callable[[Problem], int] = 1
    """Adjacent chunks that each piece of the layout is addressed as, or a function that chooses their number; more
    than one allows finer tiles."""
    uses_shape: bool = False
    """Whether the placement depends on the problem's shape or network. If not, it sees neither, and one schedule
    serves every shape."""
    ulysses_size: Callable[[int], int] = no_exchange
    """From P to u: how many ranks exchange heads for tokens first (DeepSpeed-Ulysses, arXiv 2309.14509). Tiles are
    then placed on the P / u ranks of a ring, each for its share of the heads."""
    relays: bool = False
    """Whether any rank that holds keys or queries may send them on, and not only their owner."""
    full_rows: bool = False
    """Keep full rows of scores instead of merging partial softmaxes (Ring Self-Attention, arXiv 2105.13120)."""
    sized: tuple[SizedForm, ...] = ()
    """The forms of its name that carry sizes."""
    auto_candidates: Candidates | None = None
    """The names under which ``auto`` considers it on a layout it accepts; None for its name alone."""

    @property
    def layouts(self) -> tuple[str, ...]:
        """Names of the layouts it can compute on, the default first."""
        accepted = self.only_layouts or LAYOUTS
        return tuple(dict.fromkeys((self.default_layout, *accepted)))

    @property
    def exchanges_heads(self) -> bool:
        """Whether ranks exchange heads for tokens before and after the tiles."""
        return self.ulysses_size is not no_exchange

    def candidates(self, problem: Problem) -> Sequence[str]:
        """The names under which ``auto`` considers this method; none on a layout it cannot compute on."""
        if problem.layout.name not in self.layouts:
            return ()
        return (self.name,) if self.auto_candidates is None else self.auto_candidates(problem)

    def check_layout(self, layout: SequenceLayout) -> None:
        """Raise :class:`UnsupportedError` unless this method computes on shards cut by ``layout``."""
        if layout.name not in self.layouts:
            raise UnsupportedError(
                explain(
                    got=f"method {self.name!r} on the {layout.name} layout",
                    rule=f"{self.name} works on {' or '.join(self.layouts)} shards",
                    remedy=f"Cut the sequence with layout={self.default_layout!r}, or choose method='ring'",
                )
            )

    def inner_problem(self, problem: Problem) -> Problem:
        """What is left to place once heads are exchanged: one ring of P / u ranks with the largest share of the
        heads, its layout split into chunks of this method's size.

        Raises:
            UnsupportedError: the method cannot compute on the problem's layout.
            LayoutError: u does not divide P.
        """
        self.check_layout(problem.layout)
        size = self.ulysses_size(problem.layout.cp_size)
        inner = replace(problem, layout=problem.layout.merged(size), shape=TensorShape(), network=None)
        if self.uses_shape:
            share = HeadCut.of(problem.shape, size).share_of(problem.shape)
            network = None if problem.network is None else problem.network.of_one_ring(size)
            inner = replace(inner, shape=share, network=network)
        splits = self.splits if isinstance(self.splits, int) else self.splits(inner)
        return replace(inner, layout=inner.layout.split(splits))

    def nominal_length(self, layout: SequenceLayout) -> int:
        """Tokens of a schedule that is built without a length: 1024 per chunk (per piece, if ``splits`` is a
        function), or a multiple of that which the layout divides.
        """
        inner = layout.merged(self.ulysses_size(layout.cp_size))
        chunks = inner.split(self.splits if isinstance(self.splits, int) else 1).num_chunks
        return lcm(chunks * NOMINAL_CHUNK_LENGTH, layout.split(1).num_chunks)
