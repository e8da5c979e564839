"""The text form that schedules of tiles and scans of states share: a header, and a line for each step."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from megatron_lightseq.errors import ScheduleError, explain
from megatron_lightseq.layout import SequenceLayout
from megatron_lightseq.mask import Mask
from megatron_lightseq.schedule.ir import Direction, Move, Payload


class Described(Protocol):
    """What the header names."""

    @property
    def method(self) -> str:
        """Its name."""

    @property
    def direction(self) -> Direction:
        """Of attention."""

    @property
    def layout(self) -> SequenceLayout:
        """Which rank holds which tokens."""

    @property
    def mask(self) -> Mask:
        """Which keys a query sees."""

    @property
    def seq_length(self) -> int:
        """Tokens in the whole sequence, over all ranks."""


class TextForm:
    """Writes and reads one kind of schedule.

    Args:
        kind: its name in messages, ``schedule`` or ``scan``.
        title: what stands between the method and the direction.
        entries: what a rank does in a step, in messages.
        entry: regular expression of one of these, without named groups.
        payloads: what its moves may carry.
    """

    def __init__(
        self, kind: str, *, title: str = "", entries: str, entry: str, payloads: Iterable[Payload]
    ) -> None:
        self._kind, self._title, self._entries = kind, title, entries
        self._header = re.compile(
            rf"(?P<method>\S+) {title}(?P<direction>forward|backward) (?P<layout>\S+) (?P<mask>\S+) "
            r"(?P<seq_length>\d+) tokens"
        )
        move = rf"({'|'.join(sorted(payloads))})(\d+)(?:-(\d+))?:(\d+)>(\d+)"
        self._move = re.compile(move)
        cell = rf"(-|{entry}(\+{entry})*)"
        self._step = re.compile(rf"step (?P<number>\d+) *\|(?P<cells>( +{cell})+) *\|(?P<moves>( {move})*)")

    def written(
        self,
        of: Described,
        steps: Sequence[tuple[Sequence[Sequence[object]], Sequence[Move]]],
        marked_step: int | None = None,
    ) -> str:
        """The text: for each step what every rank does, and the moves; one step may be marked."""
        lines = [f"{of.method} {self._title}{of.direction} {of.layout} {of.mask} {of.seq_length} tokens"]
        rows = [["+".join(map(str, entries)) or "-" for entries in ranks] for ranks, _ in steps]
        widths = [max(map(len, column), default=1) for column in zip(*rows, strict=True)]
        for t, (row, (_, moves)) in enumerate(zip(rows, steps, strict=True)):
            cells = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            mark = "   <-- here" if t == marked_step else ""
            lines.append(f"step {t:<3d} | {cells} | {' '.join(map(str, moves))}{mark}".rstrip())
        return "\n".join(lines)

    def read(self, text: str) -> tuple[dict[str, Any], list[tuple[list[str], tuple[Move, ...]]]]:
        """What the header names, by field; and for each step the texts of all ranks, and the moves.

        Raises:
            ScheduleError: the text does not have this form.
        """
        header, *lines = text.strip().splitlines() or [""]
        match = self._header.fullmatch(header.strip())
        if match is None:
            raise self._refused(
                f"header {header!r}",
                f"a {self._kind} begins with: METHOD {self._title}DIRECTION LAYOUT MASK N tokens",
            )
        fields = {
            "method": match["method"],
            "direction": Direction(match["direction"]),
            "layout": SequenceLayout.parse(match["layout"]),
            "mask": Mask.parse(match["mask"]),
            "seq_length": int(match["seq_length"]),
        }
        return fields, [self._read_step(number, line) for number, line in enumerate(lines)]

    def _read_step(self, number: int, line: str) -> tuple[list[str], tuple[Move, ...]]:
        match = self._step.fullmatch(line.rstrip())
        if match is None or int(match["number"]) != number:
            raise self._refused(
                f"line {line!r}",
                f"step {number} is written: step {number} | {self._entries.upper()} OF EACH RANK | MOVES",
            )
        moves = tuple(
            Move(Payload(payload), int(chunk), int(src), int(dst), count(chunk, last))
            for payload, chunk, last, src, dst in self._move.findall(match["moves"])
        )
        return match["cells"].split(), moves

    def _refused(self, got: str, rule: str) -> ScheduleError:
        remedy = f"Give the text that str({self._kind}) prints"
        return ScheduleError(explain(got=f"{self._kind} {got}", rule=rule, remedy=remedy))


def count(first: str, last: str) -> int:
    """Chunks from ``first`` to ``last``; an empty ``last`` means one chunk."""
    return int(last) - int(first) + 1 if last else 1
