"""The named kinds of masks as terms, and checks of their arguments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from operator import index, le, sub

from megatron_lightseq.errors import ConfigError, explain
from megatron_lightseq.mask.edge import FAR, NOTHING, Edge, Line, edge_of
from megatron_lightseq.mask.term import Term, Terms, both, either, term_of, whole

_CAUSAL = Line(1, moving=True)
"""The stop of a causal query: after its own position."""
_NONE = Line(NOTHING)


def window(left: int | None, right: int | None) -> Term:
    """``left`` keys back and ``right`` ahead; None for all."""
    if min(left or 0, right or 0) < 0:
        raise ConfigError(
            explain(
                got=f"window ({left}, {right})",
                rule="a window counts tokens back and ahead, so neither side is negative",
                remedy="Use None for an unbounded side",
            )
        )
    everything = whole(FAR)
    start, stop = everything.start, everything.stop
    if left is not None:
        start = edge_of([(left, 0, False), (FAR, -left, True)])
    if right is not None:
        stop = edge_of([(FAR, right + 1, True)])
    return Term(start, stop)


def checked_borders(cu_seqlens: Sequence[int]) -> tuple[int, ...]:
    """Borders of documents as a tuple of integers.

    Raises:
        ConfigError: they do not start at 0, or decrease.
    """
    borders = tuple(map(index, cu_seqlens))
    if len(borders) < 2 or borders[0] != 0 or not all(map(le, borders, borders[1:])):
        raise ConfigError(
            explain(
                got=f"cu_seqlens {abbreviated(borders)}",
                rule="document borders start at 0, never decrease, and end at the sequence length",
                remedy="Give cumulative lengths, for example (0, 3, 8) for documents of 3 and 5 tokens",
            )
        )
    return borders


def documents(borders: tuple[int, ...], causal: bool) -> Terms:
    """Packed documents: a query sees its own document; with ``causal``, no later tokens."""
    borders = tuple(dict.fromkeys(borders))  # without empty documents
    firsts, ends = borders[:-1], borders[1:]
    if not firsts:
        return ()
    if 1 in map(sub, ends, firsts):  # one-token documents may have to be joined
        start = edge_of(zip(ends, firsts, _repeat(False, firsts), strict=True))
        stop = edge_of(zip(ends, ends, _repeat(False, firsts), strict=True))
    else:
        start = Edge(firsts, firsts, _repeat(False, firsts))
        stop = Edge(firsts, ends, _repeat(False, firsts))
    return (Term(start, edge_of([(borders[-1], *_CAUSAL)]) if causal else stop),)


def padded(borders: tuple[int, ...], lengths: Sequence[int], causal: bool) -> Terms:
    """Documents followed by padding, which sees nothing and is not seen."""
    lengths = _checked_parts(borders, lengths, "lengths")
    starts: list[tuple[int, int, bool]] = []
    stops: list[tuple[int, int, bool]] = []
    for first, end, length in zip(borders, borders[1:], lengths, strict=False):
        last, padding = first + length, (end, NOTHING, False)
        starts += (last, first, False), padding
        stops += (last, *(_CAUSAL if causal else (last, False))), padding
    return (Term(edge_of(starts), edge_of(stops)),) if any(lengths) else ()


def prefix(borders: tuple[int, ...], lengths: Sequence[int]) -> Terms:
    """Documents whose first ``lengths`` tokens see each other; the tokens after them are causal."""
    lengths = _checked_parts(borders, lengths, "prefix_lengths")
    stops: list[tuple[int, int, bool]] = []
    for first, end, length in zip(borders, borders[1:], lengths, strict=False):
        stops += (first + length, first + length, False), (end, *_CAUSAL)
    return tuple(Term(term.start, edge_of(stops)) for term in documents(borders, causal=True))


def sinks(count: int) -> Terms:
    """Every query sees the first ``count`` tokens."""
    return (whole(_checked_count("sinks", count, at_least=0)),) if count else ()


def global_tokens(count: int) -> Terms:
    """The first ``count`` tokens see everything, and everything sees them."""
    count = _checked_count("global tokens", count, at_least=0)
    return (term_of([(count, Line(0), Line(FAR)), (FAR, Line(0), Line(count))]),) if count else ()


def chunk_size(size: int) -> int:
    """A chunk size, checked."""
    return _checked_count("a chunk size", size, at_least=1)


def shared_question(groups: Iterable[Sequence[int]]) -> tuple[Terms, int]:
    """Questions with several answers each, and the total number of tokens.

    Args:
        groups: for each question its length and the length of every answer.
    """
    within: list[tuple[int, Line, Line]] = []
    above: list[tuple[int, Line, Line]] = []
    at = 0
    for group in groups:
        lengths = [_checked_count("a question or answer", length, at_least=0) for length in group]
        if not lengths:
            raise ConfigError(
                explain(
                    got="a group without lengths",
                    rule="a group is the length of a question, followed by those of its answers",
                    remedy="Leave the group out, or give it a question of length 0",
                )
            )
        question = Line(at), Line(at + lengths[0])
        for number, length in enumerate(lengths):
            at += length
            within.append((at, Line(at - length), _CAUSAL))
            above.append((at, *(question if number else (_NONE, _NONE))))
    return (either((term_of(within),), (term_of(above),), at) if at else ()), at


def runs(given: Sequence[tuple[int, Line, Line]], end: int) -> Terms:
    """Runs of queries, each as ``(first query, start, stop)``, cut to the positions ``[0, end)``."""
    firsts = [index(first) for first, _, _ in given]
    if not firsts or firsts[0] != 0 or any(after <= before for before, after in pairwise(firsts)):
        raise ConfigError(
            explain(
                got=f"runs of queries from {abbreviated(firsts)}",
                rule="the first run begins at query 0, and every other run after the previous one",
                remedy="Sort them, and give queries that see nothing an empty interval",
            )
        )
    ends = (*firsts[1:], FAR)
    ended = ((after, start, stop) for after, (_, start, stop) in zip(ends, given, strict=True))
    return both((term_of(ended),), (whole(end),), end) if end else ()


def _checked_parts(borders: tuple[int, ...], lengths: Sequence[int], name: str) -> tuple[int, ...]:
    parts = tuple(map(index, lengths))
    documents = tuple(map(sub, borders[1:], borders))
    if len(parts) != len(documents):
        raise ConfigError(
            explain(
                got=f"{len(parts)} {name} for {len(documents)} documents",
                rule=f"cu_seqlens has one border more than there are {name}",
                remedy="Give one length for each document",
            )
        )
    for number, (part, length) in enumerate(zip(parts, documents, strict=True)):
        if not 0 <= part <= length:
            raise ConfigError(
                explain(
                    got=f"{name}[{number}] = {part} in a document of {length} tokens",
                    rule=f"{name} are at least 0 and at most the lengths of their documents",
                    remedy="Compare them with the differences of cu_seqlens",
                )
            )
    return parts


def _checked_count(what: str, count: int, at_least: int) -> int:
    if count < at_least:
        raise ConfigError(
            explain(
                got=f"{what} of {count}",
                rule=f"it is a number of tokens, at least {at_least}",
                remedy="Give a larger number",
            )
        )
    return index(count)


def _repeat(value: bool, like: tuple[int, ...]) -> tuple[bool, ...]:
    return (value,) * len(like)


def abbreviated(numbers: Sequence[int]) -> str:
    """All of a few numbers, or the first and the last of many."""
    if len(numbers) <= 8:
        return str(tuple(numbers))
    return f"({', '.join(map(str, numbers[:6]))}, ..., {numbers[-1]})"
