"""What a context-parallel method is: everything that is known about it, said once."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_lightseq.errors import UnsupportedError, explain
from megatron_lightseq.layout import LAYOUTS, SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule.ir import Placement
from megatron_lightseq.schedule.network import Network
from megatron_lightseq.schedule.shape import TensorShape

Candidates = Callable[[SequenceLayout, TensorShape, Network], Sequence[str]]
"""The names under which ``auto`` considers a method, given layout, shape and network."""


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
    place: Callable[[SequenceLayout, Mask], Placement]
    """Which rank computes which tile at which step."""
    summary: str = ""
    """What a rank computes, in one line."""
    source: str = ""
    """The paper or system that the method comes from."""
    default_layout: str = "contiguous"
    """The layout it is used on unless another one is asked for."""
    only_layouts: tuple[str, ...] = ()
    """The only layouts it can compute on; empty if it can compute on any."""
    splits: int = 1
    """Adjacent chunks that each piece of the layout is addressed as; more than one allows finer tiles."""
    ulysses_size: Callable[[int], int] = no_exchange
    """From P to u: how many ranks exchange heads for tokens first (DeepSpeed-Ulysses, arXiv 2309.14509). Tiles are
    then placed on the P / u ranks of a ring, each for its share of the heads."""
    full_rows: bool = False
    """Keep full rows of scores instead of merging partial softmaxes (Ring Self-Attention, arXiv 2105.13120)."""
    sized: SizedForm | None = None
    """The form of its name that carries sizes, if it has one."""
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

    def candidates(self, layout: SequenceLayout, shape: TensorShape, network: Network) -> Sequence[str]:
        """The names under which ``auto`` considers this method; none on a layout it cannot compute on."""
        if layout.name not in self.layouts:
            return ()
        return (self.name,) if self.auto_candidates is None else self.auto_candidates(layout, shape, network)

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

    def inner_layout(self, layout: SequenceLayout) -> SequenceLayout:
        """The layout on which tiles are placed: that of the ranks left after exchanging heads, with its splits."""
        return layout.merged(self.ulysses_size(layout.cp_size)).split(self.splits)
