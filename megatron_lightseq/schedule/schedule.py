"""The schedule: one frozen value that is validated, printed, compared, simulated, drawn and run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from megatron_lightseq.errors import ScheduleError
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule.ir import OF_TOKENS, Direction, Step, Tile
from megatron_lightseq.schedule.problem import TileAreas, areas_of, work_of
from megatron_lightseq.schedule.text_form import TextForm, count
from megatron_lightseq.schedule.validate import find_fault

_TILE = re.compile(r"q(\d+)(?:-(\d+))?k(\d+)(?:-(\d+))?")
_FORM = TextForm("schedule", entries="tiles", entry=_TILE.pattern, payloads=OF_TOKENS)


@dataclass(frozen=True)
class Schedule:
    """Which rank computes which tile at which step, and every transfer that this requires.

    A schedule that exists is valid: every tile with work is computed once, every input arrives in time, and every
    result reaches its owner. ``str()`` gives a text form that :meth:`parse` reads back.

    Raises:
        ScheduleError: at construction, with the first fault and a drawing of the schedule.
    """

    method: str
    direction: Direction
    layout: SequenceLayout
    mask: Mask
    seq_length: int
    """Tokens in the whole sequence, over all ranks."""
    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        self.layout.check_length(self.seq_length)
        self.mask.check_length(self.seq_length)
        fault = find_fault(self.steps, direction=self.direction, layout=self.layout, areas=self.areas)
        if fault is not None:
            raise ScheduleError(f"{fault}\n{self._draw(marked_step=fault.step)}")

    @cached_property
    def work(self) -> Mapping[Tile, int]:
        """Every tile of single chunks that holds work, with its area: how many (query, key) pairs the mask allows."""
        return work_of(self.layout, self.mask, self.seq_length)

    @property
    def areas(self) -> TileAreas:
        """The areas of tiles of any size."""
        return areas_of(self.layout, self.mask, self.seq_length)

    @cached_property
    def fingerprint(self) -> str:
        """Short hash of the whole schedule; ranks compare theirs before the first step."""
        return hashlib.sha256(str(self).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return self._draw()

    def _draw(self, marked_step: int | None = None) -> str:
        return _FORM.written(self, [(step.tiles, step.moves) for step in self.steps], marked_step)

    @staticmethod
    def parse(text: str) -> Schedule:
        """Read the form that ``str()`` writes.

        Raises:
            ScheduleError: the text does not have that form, or the schedule it describes is invalid.
        """
        fields, steps = _FORM.read(text)
        return Schedule(
            **fields, steps=tuple(Step(tuple(map(_tiles, cells)), moves) for cells, moves in steps)
        )


def _tiles(cell: str) -> tuple[Tile, ...]:
    return tuple(
        Tile(int(q), int(k), count(q, last_q), count(k, last_k))
        for q, last_q, k, last_k in _TILE.findall(cell)
    )
