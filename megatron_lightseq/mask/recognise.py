"""Recognises the kind of mask that terms are: each function guesses the parameters, and compares."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from megatron_lightseq.mask import kinds
from megatron_lightseq.mask.edge import FAR, Edge
from megatron_lightseq.mask.term import Term, Terms, both, either, narrowed

Borders = tuple[int, ...]
_CAUSAL = Edge((0,), (1,), (True,))


class Window(NamedTuple):
    """Tokens back and ahead; None for all."""

    left: int | None
    right: int | None


def window_of(term: Term) -> Window | None:
    """The window that a term equals for sequences of any length."""
    window = Window(
        left=-term.start.offsets[-1] if term.start.moving[-1] else None,
        right=term.stop.offsets[-1] - 1 if term.stop.moving[-1] else None,
    )
    is_window = min(window.left or 0, window.right or 0) >= 0 and kinds.window(*window) == term
    return window if is_window else None


def documents_of(terms: Terms, length: int) -> tuple[Borders, Window] | None:
    """The borders of packed documents, and the window in each of them."""
    if len(terms) != 1 or not length:
        return None
    (term,) = terms
    starts = term.start
    if term.stop == _CAUSAL and starts.offsets == starts.firsts and not any(starts.moving):
        return (*starts.firsts, length), Window(None, 0)
    reach = _reach(term, length)
    for borders_of in (_borders_by_start, _borders_by_stop):
        borders = borders_of(term, length)
        longest = max(end - first for first, end in pairwise(borders))
        window = Window(*(side if side < longest - 1 else None for side in reach))
        (packed,) = kinds.documents(borders, causal=False)
        if narrowed(packed, *window, length) == term:
            return borders, window
    return None


def padding_of(terms: Terms, length: int) -> tuple[Borders, tuple[int, ...], bool] | None:
    """The borders of documents with their padding, their lengths without it, and whether they are causal."""
    if len(terms) != 1:
        return None
    firsts, lengths = [], []
    for first, end in _documents(terms[0].start, length):
        firsts.append(first)
        lengths.append(end - first)
    if firsts[:1] != [0]:  # padding comes first
        firsts.insert(0, 0)
        lengths.insert(0, 0)
    borders = (*firsts, length)
    for causal in (True, False):
        if kinds.padded(borders, lengths, causal) == terms:
            return borders, tuple(lengths), causal
    return None


def prefixes_of(terms: Terms, length: int) -> tuple[Borders, tuple[int, ...]] | None:
    """The borders of documents that begin with a prefix, and the lengths of these."""
    if len(terms) != 1 or not length:
        return None
    (term,) = terms
    borders = _borders_by_start(term, length)
    lengths = tuple(term.stop.at(first) - first for first in borders[:-1])
    fits = all(0 < part <= end - first for part, (first, end) in zip(lengths, pairwise(borders), strict=True))
    return (borders, lengths) if fits and kinds.prefix(borders, lengths) == terms else None


def sinks_of(terms: Terms) -> tuple[int, bool] | None:
    """How many first tokens every query sees in a sequence of any length, and whether causally."""
    if len(terms) != 1:
        return None
    count = terms[0].stop.offsets[-1]
    for causal in (True, False):
        if 0 < count < FAR and _sinks(count, causal) == terms:
            return count, causal
    return None


def sinks_and_window_of(terms: Terms) -> tuple[int, bool, Window] | None:
    """Sinks and a window: how many first tokens every query sees, whether causally, and the window it sees as well."""
    if len(terms) != 2:
        return None
    (first, second), count = terms, terms[0].stop.offsets[-1]
    window = Window(
        -second.start.offsets[-1], second.stop.offsets[-1] - 1 if second.stop.moving[-1] else None
    )
    if not 0 < count < FAR or min(window.left or 0, window.right or 0) < 0:
        return None
    causal = window.right == 0
    joined = either(_sinks(count, causal), (kinds.window(*window),), FAR)
    return (count, causal, window) if joined == (first, second) else None


def global_tokens_of(terms: Terms) -> int | None:
    """How many first tokens see everything and are seen by everything."""
    if len(terms) != 1:
        return None
    count = terms[0].stop.offsets[-1]
    return count if 0 < count < FAR and kinds.global_tokens(count) == terms else None


def _sinks(count: int, causal: bool) -> Terms:
    sinks = kinds.sinks(count)
    return both(sinks, (kinds.window(None, 0),), FAR) if causal else sinks


def _reach(term: Term, length: int) -> tuple[int, int]:
    """The maximum distances that any query sees back and ahead, at least 0."""
    start, stop = term.start, term.stop
    backs = zip((*start.firsts[1:], length), start.offsets, start.moving, strict=True)
    aheads = zip(stop.firsts, stop.offsets, stop.moving, strict=True)
    return (
        max(0, *(-offset if moving else end - 1 - offset for end, offset, moving in backs)),
        max(0, *(offset - 1 if moving else offset - 1 - first for first, offset, moving in aheads)),
    )


def _documents(start: Edge, length: int) -> Iterator[tuple[int, int]]:
    """Queries ``[first, end)`` whose keys start at ``first``: documents without their padding."""
    for first, end, (offset, moving) in start.pieces(length):
        if moving and offset == 0:  # documents of one token
            yield from ((query, query + 1) for query in range(first, end))
        elif not moving and offset == first:
            yield first, end


def _borders_by_start(term: Term, length: int) -> Borders:
    if term.start.firsts == (0,):  # also where every token sees only itself
        return (0, length)
    return (0, *(first for first, _ in _documents(term.start, length) if first), length)


def _borders_by_stop(term: Term, length: int) -> Borders:
    stops = (piece.line.offset for piece in term.stop.pieces(length) if piece.line.offset == piece.end)
    return (0, *(stop for stop in stops if 0 < stop < length), length)
