"""The schedule: one frozen value that is validated, printed, compared, simulated, drawn and run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from megatron_lightseq.errors import ScheduleError, explain
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule.ir import OF_TOKENS, Direction, Move, Payload, Step, Tile
from megatron_lightseq.schedule.problem import TileAreas, areas_of, work_of
from megatron_lightseq.schedule.validate import find_fault

_HEADER = re.compile(
    r"(?P<method>\S+) (?P<direction>forward|backward) (?P<layout>\S+) (?P<mask>\S+) (?P<seq_length>\d+) tokens"
)
_TILE = re.compile(r"q(\d+)(?:-(\d+))?k(\d+)(?:-(\d+))?")
_MOVE = re.compile(rf"({'|'.join(OF_TOKENS)})(\d+)(?:-(\d+))?:(\d+)>(\d+)")
_CELL = rf"(-|{_TILE.pattern}(\+{_TILE.pattern})*)"
_STEP = re.compile(rf"step (?P<number>\d+) *\|(?P<tiles>( +{_CELL})+) *\|(?P<moves>( {_MOVE.pattern})*)")


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
        header = f"{self.method} {self.direction} {self.layout} {self.mask} {self.seq_length} tokens"
        rows = [["+".join(map(str, tiles)) or "-" for tiles in step.tiles] for step in self.steps]
        widths = [max(map(len, column), default=1) for column in zip(*rows, strict=True)]
        lines = [header]
        for t, (step, row) in enumerate(zip(self.steps, rows, strict=True)):
            cells = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            mark = "   <-- here" if t == marked_step else ""
            lines.append(f"step {t:<3d} | {cells} | {' '.join(map(str, step.moves))}{mark}".rstrip())
        return "\n".join(lines)

    @staticmethod
    def parse(text: str) -> Schedule:
        """Read the form that ``str()`` writes.

        Raises:
            ScheduleError: the text does not have that form, or the schedule it describes is invalid.
        """
        header, *lines = text.strip().splitlines() or [""]
        match = _HEADER.fullmatch(header.strip())
        if match is None:
            raise ScheduleError(
                explain(
                    got=f"schedule header {header!r}",
                    rule="a schedule begins with: METHOD DIRECTION LAYOUT MASK N tokens",
                    remedy="Give the text that str(schedule) prints",
                )
            )
        return Schedule(
            method=match["method"],
            direction=Direction(match["direction"]),
            layout=SequenceLayout.parse(match["layout"]),
            mask=Mask.parse(match["mask"]),
            seq_length=int(match["seq_length"]),
            steps=tuple(_parse_step(number, line) for number, line in enumerate(lines)),
        )


def _parse_step(number: int, line: str) -> Step:
    match = _STEP.fullmatch(line.rstrip())
    if match is None or int(match["number"]) != number:
        raise ScheduleError(
            explain(
                got=f"schedule line {line!r}",
                rule=f"step {number} is written: step {number} | TILES OF EACH RANK | MOVES",
                remedy="Give the text that str(schedule) prints",
            )
        )
    tiles = tuple(
        tuple(
            Tile(int(q), int(k), _count(q, last_q), _count(k, last_k))
            for q, last_q, k, last_k in _TILE.findall(cell)
        )
        for cell in match["tiles"].split()
    )
    moves = tuple(
        Move(Payload(payload), int(chunk), int(src), int(dst), _count(chunk, last))
        for payload, chunk, last, src, dst in _MOVE.findall(match["moves"])
    )
    return Step(tiles, moves)


def _count(first: str, last: str) -> int:
    """Chunks from ``first`` to ``last``; an empty ``last`` means one chunk."""
    return int(last) - int(first) + 1 if last else 1
