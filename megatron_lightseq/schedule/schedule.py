"""The schedule: one frozen value that drives the run, and is validated, printed, compared, simulated and drawn."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import MappingProxyType

from megatron_lightseq.errors import ScheduleError, explain
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule.ir import Direction, Move, Payload, Step, Tile
from megatron_lightseq.schedule.validate import find_fault

_HEADER = re.compile(
    r"(?P<method>\S+) (?P<direction>forward|backward) (?P<layout>\S+) (?P<mask>\S+) (?P<seq_length>\d+) tokens"
)
_TILE = re.compile(r"q(\d+)k(\d+)")
_MOVE = re.compile(rf"({'|'.join(Payload)})(\d+):(\d+)>(\d+)")
_CELL = rf"(-|{_TILE.pattern}(\+{_TILE.pattern})*)"
_STEP = re.compile(rf"step (?P<number>\d+) *\|(?P<tiles>( +{_CELL})+) *\|(?P<moves>( {_MOVE.pattern})*)")


@dataclass(frozen=True)
class Schedule:
    """Which rank computes which tile when, and every transfer that this takes.

    A schedule that exists is valid: every tile with work is computed once, every input is there in time, every
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
        fault = find_fault(self.steps, direction=self.direction, owner=self.layout.owner, work=self.work)
        if fault is not None:
            raise ScheduleError(f"{fault}\n{self._draw(marked_step=fault.step)}")

    @cached_property
    def work(self) -> Mapping[Tile, int]:
        """Every tile that holds work, with its area: how many (query, key) pairs the mask allows in it."""
        return work_of(self.layout, self.mask, self.seq_length)

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
            ScheduleError: the text is not of that form, or the schedule it describes is invalid.
        """
        header, *lines = text.strip().splitlines() or [""]
        match = _HEADER.fullmatch(header.strip())
        if match is None:
            raise ScheduleError(
                explain(
                    got=f"schedule header {header!r}",
                    rule="a schedule begins: METHOD DIRECTION LAYOUT MASK N tokens",
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


@lru_cache(maxsize=8)
def work_of(layout: SequenceLayout, mask: Mask, seq_length: int) -> Mapping[Tile, int]:
    """Tiles with work and their areas, for ``seq_length`` tokens cut by ``layout`` under ``mask``; read-only."""
    positions = [layout.chunk_positions(chunk, seq_length) for chunk in range(layout.num_chunks)]
    mask.check_length(seq_length)
    # In a window a tile's area depends on the distance of its queries and keys and on their lengths only.
    is_window = mask.window_size is not None
    areas: dict[tuple[int, int, int], int] = {}
    work: dict[Tile, int] = {}
    for q, queries in enumerate(positions):
        q_start, q_length = queries.start, len(queries)
        for k, keys in enumerate(positions):
            like = (keys.start - q_start, q_length, len(keys))
            area = areas.get(like) if is_window else None
            if area is None:
                area = areas[like] = mask.area(queries, keys)
            if area:
                work[Tile(q, k)] = area
    return MappingProxyType(work)


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
        tuple(Tile(int(q), int(k)) for q, k in _TILE.findall(cell)) for cell in match["tiles"].split()
    )
    moves = tuple(
        Move(Payload(payload), int(chunk), int(src), int(dst))
        for payload, chunk, src, dst in _MOVE.findall(match["moves"])
    )
    return Step(tiles, moves)
