"""Random masks of every kind, each with its pairs computed naively from its definition."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from itertools import pairwise

import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor

from megatron_lightseq.errors import UnsupportedError
from megatron_lightseq.mask import Line, Mask

Defined = tuple[Mask, Tensor]
"""A mask, and the (query, key) pairs that it allows by definition, bool."""


def pairs(length: int, allows: Callable[[int, int], bool]) -> Tensor:
    """(length, length), bool: ``allows(query, key)``."""
    rows = [[allows(q, k) for k in range(length)] for q in range(length)]
    return torch.tensor(rows, dtype=torch.bool).reshape(length, length)


def documents_of(borders: list[int]) -> list[int]:
    """The index of the document of every token."""
    return [number for number, (first, end) in enumerate(pairwise(borders)) for _ in range(first, end)]


@st.composite
def borders(draw: st.DrawFn, length: int) -> list[int]:
    return [0, *sorted(draw(st.lists(st.integers(0, length), max_size=5))), length]


@st.composite
def parts(draw: st.DrawFn, bounds: list[int]) -> list[int]:
    """The length of a part of each document."""
    return [draw(st.integers(0, end - first)) for first, end in pairwise(bounds)]


@st.composite
def window(draw: st.DrawFn, length: int) -> Defined:
    left, right = (draw(st.none() | st.integers(0, length)) for _ in range(2))

    def allows(q: int, k: int) -> bool:
        return (left is None or q - k <= left) and (right is None or k - q <= right)

    return Mask.window(left, right), pairs(length, allows)


@st.composite
def documents(draw: st.DrawFn, length: int) -> Defined:
    bounds, causal = draw(borders(length)), draw(st.booleans())
    document = documents_of(bounds)
    mask = Mask.documents(bounds, causal)
    return mask, pairs(length, lambda q, k: document[q] == document[k] and (k <= q or not causal))


@st.composite
def padded(draw: st.DrawFn, length: int) -> Defined:
    bounds, causal = draw(borders(length)), draw(st.booleans())
    lengths, document = draw(parts(bounds)), documents_of(bounds)
    is_token = [q - bounds[document[q]] < lengths[document[q]] for q in range(length)]

    def allows(q: int, k: int) -> bool:
        return document[q] == document[k] and is_token[q] and is_token[k] and (k <= q or not causal)

    return Mask.padded(bounds, lengths, causal), pairs(length, allows)


@st.composite
def prefix(draw: st.DrawFn, length: int) -> Defined:
    bounds = draw(borders(length))
    lengths, document = draw(parts(bounds)), documents_of(bounds)
    in_prefix = [q - bounds[document[q]] < lengths[document[q]] for q in range(length)]

    def allows(q: int, k: int) -> bool:
        return document[q] == document[k] and (k <= q or (in_prefix[q] and in_prefix[k]))

    return Mask.prefix(bounds, lengths), pairs(length, allows)


@st.composite
def chunked(draw: st.DrawFn, length: int) -> Defined:
    size, causal = draw(st.integers(1, length + 1)), draw(st.booleans())
    mask = Mask.chunked(size, causal)
    return mask, pairs(length, lambda q, k: q // size == k // size and (k <= q or not causal))


@st.composite
def sinks(draw: st.DrawFn, length: int) -> Defined:
    count, causal = draw(st.integers(0, length)), draw(st.booleans())
    return Mask.sinks(count, causal), pairs(length, lambda q, k: k < count and (k <= q or not causal))


@st.composite
def global_tokens(draw: st.DrawFn, length: int) -> Defined:
    count = draw(st.integers(0, length))
    return Mask.global_tokens(count), pairs(length, lambda q, k: q < count or k < count)


@st.composite
def shared_question(draw: st.DrawFn, length: int) -> Defined:
    bounds = draw(borders(length))
    groups, owner = [], []
    for first, end in pairwise(bounds):
        inner = draw(borders(end - first))
        groups.append([after - before for before, after in pairwise(inner)])
        owner += [(len(groups), number) for number in documents_of(inner)]

    def allows(q: int, k: int) -> bool:
        return owner[q][0] == owner[k][0] and k <= q and owner[k][1] in (0, owner[q][1])

    return Mask.shared_question(groups), pairs(length, allows)


@st.composite
def runs(draw: st.DrawFn, length: int) -> Defined:
    moving = st.builds(Line, st.integers(-length, length), st.just(True))
    at = st.integers(0, length) | moving
    firsts = sorted({0, *draw(st.lists(st.integers(0, length - 1), max_size=5))})
    given = [(first, draw(at), draw(at | st.none())) for first in firsts]

    def allows(q: int, k: int) -> bool:
        _, start, stop = next(run for run in reversed(given) if run[0] <= q)
        bounds = [length if x is None else x.at(q) if isinstance(x, Line) else x for x in (start, stop)]
        return bounds[0] <= k < bounds[1]

    return Mask.runs(given, draw(st.sampled_from((None, length)))), pairs(length, allows)


KINDS = (
    window,
    documents,
    padded,
    prefix,
    chunked,
    sinks,
    global_tokens,
    shared_question,
    runs,
)


def kind(length: int) -> st.SearchStrategy[Defined]:
    """A mask of any kind, for sequences of ``length`` tokens or of any length."""
    return st.one_of([strategy(length) for strategy in KINDS])


def combine(draw: st.DrawFn, a: Defined, b: Defined) -> Defined:
    if draw(st.booleans()):
        return a[0] & b[0], a[1] & b[1]
    return a[0] | b[0], a[1] | b[1]


@st.composite
def combined(draw: st.DrawFn, length: int) -> Defined:
    """Up to four masks joined by "and" and "or", sometimes cut to the length."""
    masks = [draw(kind(length)) for _ in range(draw(st.integers(1, 4)))]
    if draw(st.booleans()):
        masks = [(mask & Mask.documents((0, length), causal=False), allowed) for mask, allowed in masks]
    try:
        return reduce(lambda a, b: combine(draw, a, b), masks)
    except UnsupportedError as error:
        if "chunks of no given sequence length" in str(error):
            reject()
        raise
