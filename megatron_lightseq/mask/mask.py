"""Masks: which keys each query may see."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, reduce

from megatron_lightseq.errors import ConfigError, UnsupportedError, explain
from megatron_lightseq.mask import kinds, recognise, text
from megatron_lightseq.mask.edge import FAR, Line
from megatron_lightseq.mask.term import Terms, both, either, narrowed, stacked, whole


@dataclass(frozen=True, slots=True)
class Mask:
    """A set of (query, key) pairs that may attend, for a sequence of any length or of a given one.

    Build one with :meth:`causal`, :meth:`full`, :meth:`window`, :meth:`documents`, :meth:`padded`, :meth:`prefix`,
    :meth:`chunked`, :meth:`sinks`, :meth:`global_tokens`, :meth:`shared_question` or :meth:`runs`. ``a & b`` allows
    what both allow, ``a | b`` what either allows. Masks that allow the same pairs are equal, however they were
    made. ``str()`` gives a text form that :meth:`parse` reads back.
    """

    terms: Terms
    """The keys of a query: its interval in each term. Intervals of one query never touch."""
    length: int | None = None
    """Tokens of the sequence that the mask is made for; None where it fits any."""
    chunk: int | None = None
    """Also cut at every multiple of this position. Only without a length, and with a window as the one term."""
    _hash: int = field(default=0, init=False, repr=False, compare=False)

    def __hash__(self) -> int:
        if not self._hash:
            numbers = (-1 if number is None else number for number in (self.length, self.chunk))
            object.__setattr__(self, "_hash", hash((self.terms, *numbers)) or 1)
        return self._hash

    # --- kinds --------------------------------------------------------------------------------------------

    @staticmethod
    def causal() -> Mask:
        """A query sees its own position and all before."""
        return Mask.window(None, 0)

    @staticmethod
    def full() -> Mask:
        """A query sees every key."""
        return Mask.window(None, None)

    @staticmethod
    def window(left: int | None, right: int | None = 0) -> Mask:
        """A query sees ``left`` tokens back and ``right`` ahead (flash-attention's ``window_size``); None for all.

        Raises:
            ConfigError: a side is negative.
        """
        return Mask((kinds.window(left, right),))

    @staticmethod
    def documents(cu_seqlens: Sequence[int], causal: bool = True) -> Mask:
        """Packed documents: a query sees its own document only.

        Args:
            cu_seqlens: borders ``(0, n_1, n_1 + n_2, ..., seq_length)``, as in flash-attention's varlen calls.
            causal: whether, within a document, a query sees only itself and what comes before.

        Raises:
            ConfigError: the borders do not start at 0, or decrease.
        """
        borders = kinds.checked_borders(cu_seqlens)
        return Mask(kinds.documents(borders, causal), borders[-1])

    @staticmethod
    def padded(cu_seqlens: Sequence[int], lengths: Sequence[int], causal: bool = True) -> Mask:
        """Packed documents that are followed by padding, which sees nothing and is not seen.

        Args:
            cu_seqlens: borders of the documents with their padding, as for :meth:`documents`.
            lengths: tokens of each document without its padding.
            causal: as for :meth:`documents`.

        Raises:
            ConfigError: the borders are wrong, or a length is negative or larger than its document.
        """
        borders = kinds.checked_borders(cu_seqlens)
        return Mask(kinds.padded(borders, lengths, causal), borders[-1])

    @staticmethod
    def prefix(cu_seqlens: Sequence[int], prefix_lengths: Sequence[int]) -> Mask:
        """Packed documents whose first tokens all see each other, while later ones are causal (prefix-LM).

        Args:
            cu_seqlens: as for :meth:`documents`; ``(0, seq_length)`` for one document.
            prefix_lengths: tokens of each document's prefix; 0 for a causal document.

        Raises:
            ConfigError: the borders are wrong, or a prefix is negative or longer than its document.
        """
        borders = kinds.checked_borders(cu_seqlens)
        return Mask(kinds.prefix(borders, prefix_lengths), borders[-1])

    @staticmethod
    def chunked(size: int, causal: bool = True) -> Mask:
        """A query sees the keys of its own chunk, where chunks are cut at every multiple of ``size`` (Llama 4).

        Within packed documents, ``&`` with them: chunks are still counted from the start of the sequence.

        Raises:
            ConfigError: the size is not positive.
        """
        return _chunked(kinds.chunk_size(size), None, 0 if causal else None)

    @staticmethod
    def sinks(count: int, causal: bool = True) -> Mask:
        """A query sees the first ``count`` tokens; with a window: ``Mask.window(511) | Mask.sinks(4)``.

        Raises:
            ConfigError: the count is negative.
        """
        mask = Mask(kinds.sinks(count))
        return mask & Mask.causal() if causal else mask

    @staticmethod
    def global_tokens(count: int) -> Mask:
        """The first ``count`` tokens see everything and are seen by everything (Longformer, BigBird).

        Raises:
            ConfigError: the count is negative.
        """
        return Mask(kinds.global_tokens(count))

    @staticmethod
    def shared_question(groups: Iterable[Sequence[int]]) -> Mask:
        """Questions with several answers: an answer sees its question and itself, causally, not the other answers.

        Args:
            groups: for each question its length, followed by the lengths of its answers, all packed in this order.

        Raises:
            ConfigError: a length is negative, or a group is empty.
        """
        return Mask(*kinds.shared_question(groups))

    @staticmethod
    def runs(runs: Iterable[tuple[int, int | Line, int | Line | None]], length: int | None = None) -> Mask:
        """One interval of keys for every query, in runs of queries.

        Args:
            runs: ``(first query, start, stop)``, the first one from query 0: up to the next run, queries see the
                keys ``[start, stop)``. A :class:`Line` moves along: ``Line(-3, moving=True)`` is three keys back.
                No stop is the end of the sequence.
            length: tokens of the sequence, where the mask is for one length only.

        Raises:
            ConfigError: the runs do not start at query 0, or are not in order.
        """
        given = [(first, _line(start), _line(FAR if stop is None else stop)) for first, start, stop in runs]
        return Mask(kinds.runs(given, FAR if length is None else length), length)

    @staticmethod
    def of_rows(masks: Sequence[Mask], seq_length: int) -> Mask:
        """The masks of the rows of a batch as one, over the rows one after the other: no row sees another.

        Args:
            masks: one for each row.
            seq_length: tokens of every row.

        Raises:
            ConfigError: a mask is for sequences of another length.
        """
        for mask in masks:
            mask.check_length(seq_length)
        rows = [mask._terms_within(seq_length) for mask in masks]
        return Mask(stacked(rows, seq_length), len(masks) * seq_length)

    # --- combinations -------------------------------------------------------------------------------------

    def __and__(self, other: Mask) -> Mask:
        """What both allow.

        Raises:
            ConfigError: the masks are for sequences of different lengths.
            UnsupportedError: chunks without a sequence length meet something else than a window or a multiple.
        """
        length = _common_length(self, other)
        if length is None and (self.chunk or other.chunk):
            return _chunks_and(self, other)
        for one, other_one in ((self, other), (other, self)):
            sides = other_one.window_size
            if sides is not None and len(one.terms) == 1 and one.chunk is None:
                term = narrowed(one.terms[0], *sides, FAR if length is None else length)
                if term is not None:
                    return Mask((term,), length)
        end = FAR if length is None else length
        return Mask(both(self._terms_within(length), other._terms_within(length), end), length)

    def __or__(self, other: Mask) -> Mask:
        """What either allows.

        Raises:
            ConfigError: the masks are for sequences of different lengths.
            UnsupportedError: chunks without a sequence length meet anything but the same chunks.
        """
        if self == other:
            return self
        length = _common_length(self, other)
        if length is None and (self.chunk or other.chunk):
            return _chunks_or(self, other)
        end = FAR if length is None else length
        return Mask(either(self._terms_within(length), other._terms_within(length), end), length)

    def _terms_within(self, length: int | None) -> Terms:
        """The terms, cut to a sequence of ``length`` tokens."""
        if length is None or length == self.length:
            return self.terms
        return both(self.terms_over(length), (whole(length),), length)

    # --- what it allows -----------------------------------------------------------------------------------

    @property
    def window_size(self) -> tuple[int | None, int | None] | None:
        """``(left, right)`` of a mask that is a window and nothing else; None for any other."""
        return None if self.chunk is not None else _any_window(self)

    @property
    def cu_seqlens(self) -> tuple[int, ...] | None:
        """Borders of a mask that is packed documents, maybe with a window in them; None for any other."""
        packing = None if self.length is None else self.packing(self.length)
        return None if packing is None else packing[0]

    def packing(self, seq_length: int) -> tuple[tuple[int, ...], tuple[int | None, int | None]] | None:
        """Borders of documents, and the window in each, of a mask that is nothing else; None for any other.

        A mask that is only a window has one document of ``seq_length`` tokens.
        """
        size = self.window_size
        if size is not None:
            return (0, seq_length), size
        return None if self.length is None else recognise.documents_of(self.terms, self.length)

    @property
    def is_causal(self) -> bool:
        """True if no query sees a later key."""
        return all(
            offset <= (1 if moving else first + 1)
            for term in self.terms
            for first, offset, moving in zip(
                term.stop.firsts, term.stop.offsets, term.stop.moving, strict=True
            )
        )

    def terms_over(self, seq_length: int) -> Terms:
        """Terms that hold for the first ``seq_length`` positions: the mask's own, or made for its chunks."""
        if self.chunk is None:
            return self.terms
        number = -(-seq_length // self.chunk)
        return _chunk_terms(self, 1 << number.bit_length())  # powers of two: few different ones are kept

    def keys_of(self, query: int) -> tuple[range, ...]:
        """The keys that the query at this position sees."""
        terms = self.terms_over(query + 1)
        ranges = (range(term.start.at(query), term.stop.at(query)) for term in terms)
        return tuple(keys for keys in ranges if keys)

    def area(self, queries: range, keys: range) -> int:
        """How many (query, key) pairs of a tile are allowed; exact.

        Args:
            queries: positions of the tile's queries.
            keys: positions of the tile's keys, with the same stride.

        Raises:
            UnsupportedError: the strides differ.
        """
        if not queries or not keys:
            return 0
        terms = self.terms_over(max(queries[-1], keys[-1]) + 1)
        return sum(term.area(queries, keys) for term in terms)

    def check_length(self, seq_length: int) -> None:
        """Raise :class:`ConfigError` unless the mask is for sequences of ``seq_length`` tokens, or of any length."""
        if self.length is not None and self.length != seq_length:
            raise ConfigError(
                explain(
                    got=f"a mask ending at {self.length} for {seq_length} tokens",
                    rule="document borders end at the sequence length",
                    remedy="Add the last border (Mask.padded masks what follows the documents), or cut the sequence",
                )
            )

    def digest(self) -> bytes:
        """16 bytes that differ between masks and agree between processes, at a fraction of the time of ``str()``."""
        hashed = hashlib.blake2b(repr((self.length, self.chunk)).encode(), digest_size=16)
        for term in self.terms:
            for edge in (term.start, term.stop):
                hashed.update(len(edge.firsts).to_bytes(8, "little"))
                hashed.update(array("q", edge.firsts).tobytes() + array("q", edge.offsets).tobytes())
                hashed.update(bytes(edge.moving))
        return hashed.digest()

    # --- text ---------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return f"Mask.parse({str(self)!r})"

    def __str__(self) -> str:
        return text.written(self.terms, self.length, self.chunk)

    @staticmethod
    def parse(written: str) -> Mask:
        """Read the form that ``str()`` writes: ``causal``, ``window(511,0)``, ``causal&documents(0,3,8)``,
        ``window(511,0)|causal&sinks(4)``; ``&`` binds tighter than ``|``.

        Raises:
            ConfigError: a part of the text is no mask.
        """
        masks = [reduce(Mask.__and__, map(_meaning, parts)) for parts in text.alternatives(written)]
        return reduce(Mask.__or__, masks)


def _window(arguments: str) -> Mask:
    left, right = map(text.bound, arguments.split(","))
    return Mask.window(left, right)


def _with_lengths(make: Callable[[list[int], list[int]], Mask]) -> Callable[[str], Mask]:
    def parse(arguments: str) -> Mask:
        borders, lengths = map(text.numbers, arguments.split(";"))
        return make(borders, lengths)

    return parse


def _runs(arguments: str) -> Mask:
    length, runs = text.runs(arguments)
    return Mask.runs(runs, length)


_WORDS: dict[str, Callable[[], Mask]] = {"causal": Mask.causal, "full": Mask.full}
_CALLS: dict[str, Callable[[str], Mask]] = {
    "window": _window,
    "documents": lambda arguments: Mask.documents(text.numbers(arguments), causal=False),
    "padded": _with_lengths(lambda borders, lengths: Mask.padded(borders, lengths, causal=False)),
    "prefix": _with_lengths(Mask.prefix),
    "chunks": lambda arguments: Mask.chunked(text.number(arguments), causal=False),
    "sinks": lambda arguments: Mask.sinks(text.number(arguments), causal=False),
    "globals": lambda arguments: Mask.global_tokens(text.number(arguments)),
    "runs": _runs,
}


def _meaning(part: text.Part) -> Mask:
    try:
        return _WORDS[part.name]() if part.arguments is None else _CALLS[part.name](part.arguments)
    except ConfigError:
        raise
    except (KeyError, ValueError) as error:
        raise text.refusal(part.text) from error


# --- lengths and chunks ------------------------------------------------------------------------------------


def _common_length(a: Mask, b: Mask) -> int | None:
    if a.length is not None and b.length is not None and a.length != b.length:
        raise ConfigError(
            explain(
                got=f"masks ending at {a.length} and at {b.length}",
                rule="masks combine over one sequence length",
                remedy="Give both masks borders of the same sequence",
            )
        )
    return b.length if a.length is None else a.length


def _any_window(mask: Mask) -> recognise.Window | None:
    """The window of a mask that is nothing else, or nothing else within its chunks."""
    return recognise.window_of(mask.terms[0]) if mask.length is None and len(mask.terms) == 1 else None


def _chunked(size: int, left: int | None, right: int | None) -> Mask:
    """Chunks with a window in them. A bound that no chunk is long enough for is left out."""
    if size == 1:
        return Mask.window(0, 0)
    left, right = (None if side is None or side >= size - 1 else side for side in (left, right))
    return Mask((kinds.window(left, right),), chunk=size)


@lru_cache(maxsize=32)
def _chunk_terms(mask: Mask, number: int) -> Terms:
    """The terms of a mask for its first ``number`` chunks."""
    assert mask.chunk is not None
    length = number * mask.chunk
    chunks = kinds.documents(tuple(range(0, length + 1, mask.chunk)), causal=False)
    return both(chunks, mask.terms, length)


def _chunks_and(a: Mask, b: Mask) -> Mask:
    """``a & b`` for any sequence length, where one of them has chunks, or both have."""
    windows = _any_window(a), _any_window(b)
    sizes = sorted(mask.chunk for mask in (a, b) if mask.chunk is not None)
    if not a.terms or not b.terms:
        return Mask(())
    if windows[0] is None or windows[1] is None or sizes[-1] % sizes[0]:
        raise _chunks_refused(a, b, "&")
    (term,) = both(a.terms, b.terms, FAR)
    window = recognise.window_of(term)
    assert window is not None, "two windows meet in a window"
    return _chunked(sizes[0], *window)


def _chunks_or(a: Mask, b: Mask) -> Mask:
    """``a | b`` for any sequence length, where one of them has chunks, or both have."""
    if not a.terms or not b.terms:
        return a if a.terms else b
    joined = either(a.terms, b.terms, FAR)
    window = recognise.window_of(joined[0]) if len(joined) == 1 else None
    if a.chunk is None or a.chunk != b.chunk or window is None:
        raise _chunks_refused(a, b, "|")
    return _chunked(a.chunk, *window)


def _chunks_refused(a: Mask, b: Mask, operator: str) -> UnsupportedError:
    return UnsupportedError(
        explain(
            got=f"{a} {operator} {b} without a sequence length",
            rule="chunks of no given sequence length combine with windows and multiples of their size (&) and with the "
            "same chunks (|)",
            remedy="Give both masks a length first: & Mask.documents((0, seq_length), causal=False)",
        )
    )


def _line(at: int | Line) -> Line:
    return at if isinstance(at, Line) else Line(at)
