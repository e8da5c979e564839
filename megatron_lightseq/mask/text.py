"""The text form of masks: written from terms, and parsed into parts that mask.py interprets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from megatron_lightseq.errors import ConfigError, explain
from megatron_lightseq.mask import recognise
from megatron_lightseq.mask.edge import FAR, NOTHING, Line
from megatron_lightseq.mask.recognise import Window
from megatron_lightseq.mask.term import Term, Terms

_CALL = re.compile(r"(?P<name>[a-z]+)(?:\((?P<arguments>[^()]*)\))?")
_LINE = re.compile(r"(?P<constant>\d+|inf)|p(?P<offset>[+-]\d+)?")
_RUN = re.compile(r"(?P<first>\d+):(?:none|(?P<start>[^.]+)\.\.(?P<stop>[^.]+))")


# --- writing -----------------------------------------------------------------------------------------------


@lru_cache(
    maxsize=16
)  # plans of both directions name their mask, and those of many documents take milliseconds
def written(terms: Terms, length: int | None, chunk: int | None) -> str:
    """The shortest known text for a mask."""
    if not terms:
        return "sinks(0)" + ("" if length is None else f"&documents(0,{length})")
    known = _written_for_any_length(terms, chunk) if length is None else _written_for(terms, length)
    return known or "|".join(_runs_text(term, length) for term in terms)


def _written_for_any_length(terms: Terms, chunk: int | None) -> str | None:
    window = recognise.window_of(terms[0]) if len(terms) == 1 else None
    if window is not None:
        parts = [_window_text(window), *([] if chunk is None else [f"chunks({chunk})"])]
        return "&".join(filter(None, parts)) or "full"
    if (sinks := recognise.sinks_of(terms)) is not None:
        return _sinks_text(*sinks)
    if (found := recognise.sinks_and_window_of(terms)) is not None:
        count, causal, window = found
        return f"{_window_text(window)}|{_sinks_text(count, causal)}"
    seen = recognise.global_tokens_of(terms)
    return None if seen is None else f"globals({seen})"


def _written_for(terms: Terms, length: int) -> str | None:
    if (documents := recognise.documents_of(terms, length)) is not None:
        borders, window = documents
        return "&".join(filter(None, [_window_text(window), f"documents({_numbers_text(borders)})"]))
    if (padding := recognise.padding_of(terms, length)) is not None:
        borders, lengths, causal = padding
        return ("causal&" if causal else "") + f"padded({_numbers_text(borders)};{_numbers_text(lengths)})"
    if (prefixes := recognise.prefixes_of(terms, length)) is not None:
        return f"prefix({';'.join(map(_numbers_text, prefixes))})"
    return None


def _window_text(window: Window) -> str:
    """Empty for a window without bounds."""
    if window.left is None and window.right in (None, 0):
        return "" if window.right is None else "causal"
    return f"window({','.join('inf' if side is None else str(side) for side in window)})"


def _sinks_text(count: int, causal: bool) -> str:
    return f"causal&sinks({count})" if causal else f"sinks({count})"


def _numbers_text(values: Sequence[int]) -> str:
    return ",".join(map(str, values))


def _runs_text(term: Term, length: int | None) -> str:
    """``runs(N;FIRST:START..STOP,...)``: from query FIRST on, keys START to STOP; ``p`` is the query's position.

    ``N;`` is the sequence length, where the mask has one; ``FIRST:none`` is for queries that see nothing.
    """
    runs = []
    for first, _, start, stop in term.runs(FAR if length is None else length):
        keys = "none" if start == Line(NOTHING) else f"{_line_text(start)}..{_line_text(stop)}"
        runs.append(f"{first}:{keys}")
    return f"runs({'' if length is None else f'{length};'}{','.join(runs)})"


def _line_text(line: Line) -> str:
    if line.moving:
        return f"p{line.offset:+d}" if line.offset else "p"
    return "inf" if line.offset == FAR else str(line.offset)


# --- reading -----------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """``name(arguments)``, or ``name`` alone."""

    name: str
    arguments: str | None
    text: str


def alternatives(text: str) -> Iterator[list[Part]]:
    """The parts of a text: joined by ``&`` within each list, the lists joined by ``|``.

    Raises:
        ConfigError: a part is neither a name nor a name with arguments.
    """
    for alternative in text.replace(" ", "").split("|"):
        parts = []
        for part in alternative.split("&"):
            match = _CALL.fullmatch(part)
            if match is None:
                raise refusal(part)
            parts.append(Part(match["name"], match["arguments"], part))
        yield parts


def refusal(part: str) -> ConfigError:
    """The error for an unknown part."""
    return ConfigError(
        explain(
            got=f"mask text {part!r}",
            rule="a mask is causal, full, window(LEFT,RIGHT), documents(0,...,N), padded(0,...,N;VALID,...), "
            "prefix(0,...,N;LENGTH,...), chunks(SIZE), sinks(COUNT), globals(COUNT) or runs(...), or several joined "
            "by & (both allow) and | (either allows)",
            remedy="Write, for example, causal&documents(0,3,8)",
        )
    )


def number(text: str) -> int:
    """A number in digits.

    Raises:
        ValueError: the text is something else.
    """
    if not text.isdecimal():
        raise ValueError(text)
    return int(text)


def numbers(text: str) -> list[int]:
    """Numbers separated by commas.

    Raises:
        ValueError: the text is something else.
    """
    return [number(part) for part in text.split(",")]


def bound(text: str) -> int | None:
    """A side of a window: a number, or ``inf`` for None.

    Raises:
        ValueError: it is neither.
    """
    return None if text == "inf" else number(text)


def runs(text: str) -> tuple[int | None, list[tuple[int, Line, Line]]]:
    """The arguments of ``runs(...)``: the length, and runs as ``(first query, start, stop)``.

    Raises:
        ValueError: the text is not of that form.
    """
    head, semicolon, tail = text.rpartition(";")
    found = []
    for part in tail.split(","):
        match = _RUN.fullmatch(part)
        if match is None:
            raise ValueError(part)
        start, stop = (_parse_line(match[name]) for name in ("start", "stop"))
        found.append((int(match["first"]), start, stop))
    return number(head) if semicolon else None, found


def _parse_line(text: str | None) -> Line:
    if text is None:
        return Line(NOTHING)
    match = _LINE.fullmatch(text)
    if match is None:
        raise ValueError(text)
    if constant := match["constant"]:
        return Line(FAR if constant == "inf" else int(constant))
    return Line(int(match["offset"] or 0), moving=True)
