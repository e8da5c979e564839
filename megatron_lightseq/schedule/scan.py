"""Schedules of states: how what earlier tokens leave behind reaches the ranks behind them, in linear attention.

Tokens act on a state S as an affine map S -> M S + B, and maps of adjacent runs of tokens compose. Of a run of chunks,
a rank may know the MAP (M and B: what it does to any state) or the STATE behind it (B alone, which is enough where a
document begins in its first chunk). A scan says which rank folds what, and what it sends; in the end every rank has the
state that its own tokens need. Each rank holds one chunk of adjacent tokens.

A scan in the backward direction carries gradients of states, from the last rank to the first.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from megatron_lightseq.errors import LayoutError, ScheduleError, explain
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule.ir import OF_STATES, Direction, Fold, Item, Move, Payload, ScanStep
from megatron_lightseq.schedule.scan_validate import find_scan_fault, states_needed
from megatron_lightseq.schedule.text_form import TextForm, count

_ITEM = rf"({'|'.join(sorted(OF_STATES))})(\d+)(?:-(\d+))?"
_FOLD = re.compile(rf"{_ITEM}\*{_ITEM}")
_FORM = TextForm("scan", title="scan ", entries="folds", entry=_FOLD.pattern, payloads=OF_STATES)


@dataclass(frozen=True)
class Scan:
    """Which rank folds what at which step, and every transfer of a state or a map.

    A scan that exists is valid: what is folded and sent is there, and every rank gets the state that it needs.
    ``str()`` gives a text form that :meth:`parse` reads back.

    Raises:
        LayoutError: at construction, if ranks do not hold one chunk of adjacent tokens each.
        ScheduleError: at construction, with the first fault and a drawing of the scan.
    """

    method: str
    direction: Direction
    layout: SequenceLayout
    mask: Mask
    """Causal, or causal documents."""
    seq_length: int
    """Tokens in the whole sequence, over all ranks."""
    steps: tuple[ScanStep, ...]

    def __post_init__(self) -> None:
        if self.layout.num_chunks != self.layout.cp_size or self.layout.name != "contiguous":
            raise LayoutError(
                explain(
                    got=f"a scan over {self.layout}",
                    rule="states go through the tokens in their order, so every rank holds one chunk of adjacent ones",
                    remedy=f"Use {SequenceLayout.contiguous(self.layout.cp_size)}",
                )
            )
        self.layout.check_length(self.seq_length)
        self.mask.check_length(self.seq_length)
        fault = find_scan_fault(
            self.steps, direction=self.direction, cp_size=self.layout.cp_size, needed=self.needed
        )
        if fault is not None:
            raise ScheduleError(f"{fault}\n{self._draw(marked_step=fault.step)}")

    @cached_property
    def needed(self) -> Mapping[int, Item]:
        """By rank: the state that its tokens need. A rank whose shard begins with a document needs none."""
        packing = self.mask.packing(self.seq_length)
        borders = (0, self.seq_length) if packing is None else packing[0]
        size = self.layout.cp_size
        return states_needed(borders, size, self.seq_length // size, self.direction)

    def uses_own(self, rank: int) -> bool:
        """Whether the scan uses what this rank's own tokens do to a state."""
        own = {Item(Payload.MAP, rank), Item(Payload.STATE, rank)}
        return any(
            (move.src == rank and Item(move.payload, move.chunk, move.chunks) in own) for move in self._moves
        ) or any(item in own for step in self.steps for fold in step.folds[rank] for item in fold)

    @property
    def _moves(self) -> list[Move]:
        return [move for step in self.steps for move in step.moves]

    @cached_property
    def fingerprint(self) -> str:
        """Short hash of the whole scan; ranks compare theirs before the first step."""
        return hashlib.sha256(str(self).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return self._draw()

    def _draw(self, marked_step: int | None = None) -> str:
        return _FORM.written(self, [(step.folds, step.moves) for step in self.steps], marked_step)

    @staticmethod
    def parse(text: str) -> Scan:
        """Read the form that ``str()`` writes.

        Raises:
            ScheduleError: the text does not have that form, or the scan it describes is invalid.
        """
        fields, steps = _FORM.read(text)
        return Scan(
            **fields, steps=tuple(ScanStep(tuple(map(_folds, cells)), moves) for cells, moves in steps)
        )


def _folds(cell: str) -> tuple[Fold, ...]:
    return tuple(Fold(_item(*found[:3]), _item(*found[3:])) for found in _FOLD.findall(cell))


def _item(kind: str, first: str, last: str) -> Item:
    return Item(Payload(kind), int(first), count(first, last))
